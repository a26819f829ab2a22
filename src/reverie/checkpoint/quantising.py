"""Weights quantised as they are opened, and matrix products in 8 bits.

    fp8     8-bit floats (e4m3), a scale for each row      relative error of a weight up to 1/16
    int8    8-bit integers, a scale for each row           error up to 1/254 of the row's largest weight
    int4    4-bit integers, a scale for each 32 (Q4_0)     error up to 1/8 of the largest of 32 weights

Where a device multiplies 8 bits natively, inputs of linear layers are rounded in the same way, each row (token) by a
scale of its own (dynamic quantisation; Dettmers et al. 2022, section 2.1). Elsewhere weights are unpacked at every use.
"""

import re
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from reverie.checkpoint.packed import PackedTensor
from reverie.checkpoint.quantised import NUMBERS, QuantisedTensor, products_in_bytes, rounded

Quantisation = Literal["fp8", "int8", "int4"]
PACKINGS: dict[Quantisation, str] = {"fp8": "F8_E4M3", "int8": "I8", "int4": "Q4_0"}
UNTOUCHED = ("vae",)  # its weights are few, and the picture is made of them
GROUP = 32  # weights that share a scale in Q4_0
# Where the picture, the time and the prompt enter a denoising network and the answer leaves it: a hundredth of the
# weights, in which every later layer's error begins.
ENDS = re.compile(
    r"(conv_in|conv_out|time_embedding|add_embedding|class_embedding"
    r"|pos_embed|time_text_embed|context_embedder|norm_out|proj_out)(\.|$)"
)


def quantisation_of(part: str, weights: str) -> Quantisation | None:
    """To which the weights of a part of a model are quantised, by its name and by how they are kept."""
    return None if part in UNTOUCHED else next((kind for kind in PACKINGS if kind == weights), None)


def quantise(module: nn.Module, kind: Quantisation, device: torch.device, dtype: torch.dtype) -> None:
    """Put quantised weights on a device in the places of those of linear layers and convolutions, one after the other.

    The ends of a network stay as they are, and layers whose rows are no multiple of 32 numbers long.

    Args:
        dtype: what they are unpacked to.
    """
    for layer in list(quantisable(module)):
        packed = quantised(layer.weight.detach().to(device), kind)
        layer.register_parameter("weight", nn.Parameter(PackedTensor.of(packed, dtype), requires_grad=False))


def quantisable(module: nn.Module) -> Iterator[nn.Linear | nn.Conv2d]:
    """The layers of a network whose weights `quantise` puts others in the places of."""
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not ENDS.match(path) and layer.weight[0].numel() % GROUP == 0:
            yield layer


def quantised_size(weight: Tensor, kind: Quantisation) -> int:
    """Bytes of a weight in another packing, its scales with it."""
    if PACKINGS[kind] not in NUMBERS:
        return weight.numel() // GROUP * (2 + GROUP // 2)
    return weight.numel() + 4 * len(weight)


def quantised(weight: Tensor, kind: Quantisation) -> QuantisedTensor:
    """A weight `(rows, ...)` in another packing. Rows are a multiple of 32 numbers long for `int4`."""
    packing, rows = PACKINGS[kind], weight.float().flatten(1)
    if packing not in NUMBERS:
        return QuantisedTensor(_q4_0(rows), packing, tuple(weight.shape))
    data, scale = rounded(rows, packing)
    products = weight.ndim == 2 and products_in_bytes(packing, weight.device)
    return QuantisedTensor(data.reshape(weight.shape), packing, tuple(weight.shape), scale.flatten(), products)


def _q4_0(rows: Tensor) -> Tensor:
    """Blocks of 32 numbers `d * (q - 8)`, q from 0 to 15: the largest in size becomes -8 (ggml `quantize_row_q4_0`)."""
    groups = rows.reshape(-1, GROUP)
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    d = (largest / -8).half()
    inverse = torch.where(d == 0, 0.0, 1 / d.float())
    q = (groups * inverse + 8.5).clamp(0, 15).to(torch.uint8)
    low, high = q.chunk(2, dim=1)
    return torch.cat([d.view(torch.uint8), low | (high << 4)], dim=1).flatten()
