"""One example of every change that a file can hold, for layers of any shape."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from reverie.adapters.deltas import Delta, assembled

RANK = 3
ALPHA = 2.0
BLOCK = 4


def random(*shape: int, generator: torch.Generator, scale: float = 0.3) -> Tensor:
    return torch.randn(*shape, generator=generator) * scale


def examples(shape: Sequence[int], generator: torch.Generator) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Names and tensors by ending; channels are multiples of 8.

    Args:
        shape: of the weight: `(out, in)` or `(out, in, k, k)`.
    """
    out, into, *kernel = shape
    one = [1 for _ in kernel]
    flat = into * (kernel[0] * kernel[1] if kernel else 1)

    def r(*sizes: int) -> Tensor:
        return random(*sizes, generator=generator)

    lora = {"lora_down.weight": r(RANK, into, *kernel), "lora_up.weight": r(out, RANK, *one)}
    loha = {"hada_w1_a": r(out, 3), "hada_w1_b": r(3, flat), "hada_w2_a": r(out, 3), "hada_w2_b": r(3, flat)}
    lokr = {"lokr_w1": r(2, 4), "lokr_w2": r(out // 2, into // 4, *kernel)}
    a, b = [("a1.weight", r(into, RANK, *one)), ("a2.weight", r(RANK, into, *one))], r(RANK, into, *kernel)
    yield "lora", lora
    yield "lora with bias", lora | {"lora_up.bias": r(out)}
    yield "loha", loha
    yield "lokr", lokr
    yield "lokr of factors", {
        "lokr_w1_a": r(2, 2), "lokr_w1_b": r(2, 4), "lokr_w2_a": r(out // 2, 2), "lokr_w2_b": r(2, flat // 4)
    }  # fmt: skip
    yield "glora", dict(a) | {"b1.weight": r(out, RANK, *one), "b2.weight": b}
    yield "oft", {"oft_blocks": r(out // BLOCK, BLOCK, BLOCK)}
    yield "oft rescaled", {"oft_blocks": r(out // BLOCK, BLOCK, BLOCK), "rescale": 1 + r(out, *(1 for _ in shape[1:]))}
    yield "boft", {"oft_blocks": r(2, out // BLOCK, BLOCK, BLOCK)}
    yield "old oft", {"oft_diag": torch.linalg.qr(r(out // BLOCK, BLOCK, BLOCK)).Q}
    yield "input oft", {"oft_R.weight": r(flat // BLOCK, BLOCK * (BLOCK - 1) // 2)}
    yield "input oft shared", {"oft_R.weight": r(1, BLOCK * (BLOCK - 1) // 2)}
    yield "input boft", {"boft_R": r(2, flat // BLOCK, BLOCK, BLOCK), "boft_s": 1 + r(out, 1)}
    yield "ia3 of outputs", {"weight": r(out), "on_input": torch.tensor(0)}
    yield "ia3 of inputs", {"weight": r(into), "on_input": torch.tensor(1)}
    yield "peft ia3", {"ia3_l": 1 + r(out, 1)}
    yield "full", {"diff": r(*shape), "diff_b": r(out)}
    yield "only bias", {"diff_b": r(out)}
    yield "set", {"set_weight": r(*shape)}
    yield "merged set", lora | lokr | {"diff_b": r(out)}
    yield "dora of inputs", lora | {"dora_scale": 1 + r(1, into, *one)}
    yield "dora of outputs", lora | {"dora_scale": 1 + r(out, 1, *one)}
    yield "dora of peft", lora | {"lora_magnitude_vector": 1 + r(out)}
    yield "dora on loha", loha | {"dora_scale": 1 + r(out, 1, *one)}
    yield "dora on lokr", lokr | {"dora_scale": 1 + r(out, 1, *one)}
    if kernel:
        core = r(RANK, RANK, *kernel)
        yield "lora tucker", {"lora_down.weight": r(RANK, into, 1, 1), "lora_up.weight": r(out, RANK, 1, 1),
                              "lora_mid.weight": core}  # fmt: skip
        yield "loha tucker", {"hada_w1_a": r(3, out), "hada_w1_b": r(3, into), "hada_w2_a": r(3, out),
                              "hada_w2_b": r(3, into), "hada_t1": core, "hada_t2": r(3, 3, *kernel)}  # fmt: skip
        yield "lokr tucker", {"lokr_w1": r(2, 4), "lokr_w2_a": r(2, out // 2), "lokr_w2_b": r(2, into // 4),
                              "lokr_t2": r(2, 2, *kernel)}  # fmt: skip
        yield "glora tucker", dict(a) | {"b1.weight": r(out, RANK, 1, 1), "b2.weight": r(RANK, into, 1, 1),
                                         "bm.weight": core}  # fmt: skip


NAMES = [name for name, _ in examples((16, 8, 3, 3), torch.Generator())]
LINEAR_NAMES = [name for name, _ in examples((16, 8), torch.Generator())]


def tensors_of(name: str, shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of one example."""
    found = dict(examples(shape, torch.Generator().manual_seed(seed)))[name]
    return {ending: t.to(dtype) if t.is_floating_point() else t for ending, t in found.items()}


def change(name: str, shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Delta:
    """One example, built as a file is."""
    return assembled(tensors_of(name, shape, seed, dtype), ALPHA, shape)


def conv(kernel: int = 3, stride: int = 1, dtype: torch.dtype = torch.float32) -> nn.Conv2d:
    """8 channels to 16."""
    torch.manual_seed(0)
    return nn.Conv2d(8, 16, kernel, stride, kernel // 2).to(dtype).requires_grad_(False)


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """8 features to 16."""
    torch.manual_seed(0)
    return nn.Linear(8, 16).to(dtype).requires_grad_(False)


def merged_output(layer: nn.Module, delta: Delta, x: Tensor, strength: float) -> Tensor:
    """What the layer says when the differences are added to its weights."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    more = delta.bias_difference(bias, strength)
    state: Mapping[str, Tensor] = {
        "weight": weight + delta.difference(weight, strength), "bias": bias if more is None else bias + more
    }  # fmt: skip
    result: Tensor = torch.func.functional_call(layer, dict(state), (x,))
    return result
