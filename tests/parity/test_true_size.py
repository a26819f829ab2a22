"""The networks of the published models at true size against diffusers and transformers: one evaluation of each.

Both share one set of random weights, so that memory is needed once: 10 GB for the largest. T5 XXL would take 19 GB in
float32; it has 6 of its 24 layers here, which are all alike. Names and shapes at full size are the matter of
tests/families/test_published.py and test_sd3_nets.py.

Tolerance 1e-5 of the largest number, as in test_nets; 1e-4 for the 70 transformer blocks of SDXL and the text encoders
of 23 and 32 layers, whose rounding adds up.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reverie.families import configs
from reverie.families.pieces import tidied_clip
from reverie.families.sd3 import configs as sd3
from reverie.families.sd3.names import t5_tensors
from reverie.nets.clip_text import ClipText
from reverie.nets.mmdit import MMDiT
from reverie.nets.t5 import T5Config, T5Encoder
from reverie.nets.unet import UNet
from tests.families import published
from tests.parity.test_nets import difference, rand

diffusers: Any = import_module("diffusers")
transformers: Any = import_module("transformers")

Compare = Callable[[], tuple[Tensor, Tensor]]
LAYERS = 6  # of T5's 24


def filled(make: Callable[[], Any]) -> Any:
    """A network with numbers from one block of noise, of the size that keeps activations what they are."""
    with torch.device("meta"):
        network = make().eval()
    network.to_empty(device="cpu")
    noise = rand(1 << 22)
    for name, t in [*network.named_parameters(), *network.named_buffers()]:
        if not t.is_floating_point():
            t.copy_(torch.arange(t.numel()).reshape(t.shape))  # the positions of CLIP
            continue
        fan_in = math.prod(t.shape[1:])
        scale, mean = (fan_in**-0.5, 0.0) if t.ndim > 1 else (0.1, float("norm" in name and name.endswith("weight")))
        flat = t.detach().view(-1)
        for part in flat.split(len(noise)):
            part.copy_(noise[: len(part)]).mul_(scale).add_(mean)
    return network


def ours(make: Callable[[], nn.Module], tensors: dict[str, Tensor]) -> Any:
    """Our network with the reference's own tensors."""
    with torch.device("meta"):
        network = make()
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval()


def ids(length: int = 77) -> Tensor:
    return torch.randint(1, 40000, (1, length), generator=torch.Generator().manual_seed(0))


def unet(model: str) -> tuple[Tensor, Tensor]:
    """One evaluation on 16x16 latents."""
    json = published.UNETS[model]
    config = configs.unet_config(json)
    reference = filled(lambda: diffusers.UNet2DConditionModel(**json))
    network: UNet = ours(lambda: UNet(config), reference.state_dict())
    x, context = rand(1, config.in_channels, 16, 16), rand(1, 77, config.context_width, seed=1)
    pooled, sizes = rand(1, 1280, seed=2), torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])
    added = {"text_embeds": pooled, "time_ids": sizes} if config.vector else None
    want = reference(x, 500, context, added_cond_kwargs=added, return_dict=False)[0]
    given = {}
    if config.vector:
        numbers = reference.add_time_proj(sizes.flatten()).reshape(1, -1)
        given["vector"] = torch.cat([pooled, numbers], dim=1)
    return network(x, torch.tensor([500.0]), context, **given), want


def text(json: dict[str, Any], projected: bool) -> tuple[Tensor, Tensor]:
    """The last layer of a prompt of 77 tokens."""
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    reference = filled(lambda: getattr(transformers, name)(transformers.CLIPTextConfig(**json)))
    config = configs.text_config(json, projected=projected)
    network: ClipText = ours(lambda: ClipText(config), tidied_clip(reference.state_dict()))
    return network(ids()), reference(ids()).last_hidden_state


def transformer(model: str) -> tuple[Tensor, Tensor]:
    """One evaluation on 16x16 latents and a short prompt."""
    json = published.TRANSFORMERS[model]
    config = sd3.transformer_config(json)
    reference = filled(lambda: diffusers.SD3Transformer2DModel(**json))
    network: MMDiT = ours(lambda: MMDiT(config), reference.state_dict())
    x, t = rand(1, 16, 16, 16), torch.tensor([500.0])
    context, pooled = rand(1, 20, config.context_width, seed=1), rand(1, config.vector_width, seed=2)
    want = reference(x, context, pooled, t, return_dict=False)[0]
    return network(x, t, context, pooled), want


def t5() -> tuple[Tensor, Tensor]:
    """A prompt of 40 tokens through some of the layers."""
    json = sd3.t5_json(replace(T5Config(), layers=LAYERS))
    reference = filled(lambda: transformers.T5EncoderModel(transformers.T5Config(**json)))
    config = sd3.t5_config(json)
    assert config == replace(T5Config(), layers=LAYERS)
    network: T5Encoder = ours(lambda: T5Encoder(config), t5_tensors(reference.state_dict()))
    prompt = ids(40) % 32000
    return network(prompt), reference(prompt).last_hidden_state


NETWORKS: dict[str, tuple[Compare, float]] = {
    "U-Net of SD 2.1": (lambda: unet("stable-diffusion-2-1"), 1e-5),
    "U-Net of SDXL": (lambda: unet("stable-diffusion-xl-base-1.0"), 1e-4),
    "text encoder H of SD 2": (lambda: text(published.OPEN_CLIP_H, False), 1e-4),
    "text encoder G of SDXL": (lambda: text(published.OPEN_CLIP_G, True), 1e-4),
    "transformer of SD 3.5 medium": (lambda: transformer("stable-diffusion-3.5-medium"), 1e-5),
    "T5 XXL, 6 layers": (t5, 1e-5),
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("network", list(NETWORKS))
@torch.no_grad()
def test_one_evaluation(network: str) -> None:
    compare, tolerance = NETWORKS[network]
    got, want = compare()
    assert bool(torch.isfinite(want).all()) and want.std() > 0
    assert difference(got, want) < tolerance
