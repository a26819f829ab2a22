"""Merged weights against peft's, for the algorithms it has; against the published formulas in float64 for the others.

Tolerance: peft computes in float32, we in float64 here; sums over at most 144 numbers near 1 agree to 2e-5.
"""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from reverie.adapters.deltas import InputOFT, assembled
from tests.adapters.kinds_of_change import ALPHA, RANK, tensors_of

TOLERANCE = 2e-5
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(16, 24),
    "square": lambda: nn.Linear(16, 16),
    "conv": lambda: nn.Conv2d(16, 24, 3, padding=1),
    "square conv": lambda: nn.Conv2d(16, 16, 3, padding=1),
    "conv 1x1": lambda: nn.Conv2d(16, 24, 1),
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=["layer"]),
    "lora with bias": lambda: peft.LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=["layer"]),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["layer"]),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["layer"]),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, init_weights=False, target_modules=["layer"]),
    "loha effective": lambda: peft.LoHaConfig(r=3, alpha=5, use_effective_conv2d=True, target_modules=["layer"]),
    "lokr": lambda: peft.LoKrConfig(r=1, alpha=5, init_weights=False, target_modules=["layer"]),
    "lokr whole": lambda: peft.LoKrConfig(r=64, alpha=64, init_weights=False, target_modules=["layer"]),
    "lokr both": lambda: peft.LoKrConfig(r=1, alpha=5, decompose_both=True, target_modules=["layer"]),
    "lokr effective": lambda: peft.LoKrConfig(r=1, alpha=5, use_effective_conv2d=True, target_modules=["layer"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, use_cayley_neumann=True, target_modules=["layer"]),
    "oft exact": lambda: peft.OFTConfig(oft_block_size=4, r=0, use_cayley_neumann=False, target_modules=["layer"]),
    "oft shared": lambda: peft.OFTConfig(oft_block_size=4, r=0, block_share=True, target_modules=["layer"]),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["layer"]),
    "boft of 3": lambda: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["layer"]),
    "ia3": lambda: peft.IA3Config(target_modules=["layer"], feedforward_modules=[]),
    "ia3 of inputs": lambda: peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"]),
}
# peft's file does not say whether inputs or outputs of a square convolution are scaled: ours are outputs.
PAIRS = [(kind, name) for kind in LAYERS for name in CONFIGS if (kind, name) != ("square conv", "ia3 of inputs")]
ENDINGS = {
    "lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_B.bias": "lora_up.bias",
    "lora_magnitude_vector": "lora_magnitude_vector", "oft_R.weight": "oft_R.weight",
}  # fmt: skip


class Holder(nn.Module):
    """A network of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        said: Tensor = self.layer(x)
        return said


def by_peft(layer: nn.Module, config: Any) -> tuple[dict[str, Tensor], nn.Module]:
    """The tensors of a random adapter as peft writes them, and the layer with it merged."""
    model = peft.get_peft_model(Holder(layer), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    state = {
        name.removeprefix("base_model.model.layer."): t for name, t in peft.get_peft_model_state_dict(model).items()
    }
    tensors = {ENDINGS.get(name, name): t.clone() for name, t in state.items()}
    return tensors, model.merge_and_unload().layer


def block_diagonal(*blocks: Tensor) -> Tensor:
    result: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return result


class BlockDiagonal:
    """What peft's CUDA extension computes, without which it makes no butterflies."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([block_diagonal(*factor) for factor in blocks])]


@pytest.mark.filterwarnings("ignore:.*tensor.s. have invalid shape")  # peft warns of biases of its own
@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_merged_weights_are_those_of_peft(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", BlockDiagonal)
    torch.manual_seed(2)
    layer, config = LAYERS[kind](), CONFIGS[name]()
    assert isinstance(layer.weight, Tensor) and isinstance(layer.bias, Tensor)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    tensors, merged = by_peft(layer, config)
    alpha = getattr(config, "lora_alpha", getattr(config, "alpha", None))
    if alpha is not None and name == "rslora":
        alpha *= 4**0.5
    delta = assembled({ending: t.double() for ending, t in tensors.items()}, alpha, weight.shape)
    if name == "oft exact":
        assert isinstance(delta, InputOFT)
        delta = InputOFT(delta.vectors, terms=0)
    more = delta.bias_difference(bias, 1.0)
    assert isinstance(merged.weight, Tensor) and isinstance(merged.bias, Tensor)
    assert (merged.weight - weight).abs().max() > 0.01
    torch.testing.assert_close(weight + delta.difference(weight, 1.0), merged.weight.double(), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(bias if more is None else bias + more, merged.bias.double(), rtol=0, atol=TOLERANCE)


# Formulas as they are published, written out with whole matrices, in float64

SHAPES = {"linear": (16, 8), "conv": (16, 8, 3, 3)}


def flat(t: Tensor) -> Tensor:
    return t.reshape(len(t), -1)


def rotation(blocks: Tensor) -> Tensor:
    """Qiu et al. 2023: block diagonal, `(I + Q) (I - Q)^-1` each, `Q = B - B^T`."""
    one = torch.eye(blocks.shape[-1]).double()
    return block_diagonal(*[(one + b - b.T) @ torch.linalg.inv(one - b + b.T) for b in blocks])


def butterfly(blocks: Tensor, size: int) -> Tensor:
    """Liu et al. 2023, equation 4: a product of block rotations, each between a permutation and its inverse."""
    product = torch.eye(size).double()
    for i, factor in enumerate(blocks):
        stride = 2**i * factor.shape[-1] // 2
        order = [
            start + half * stride + at
            for start in range(0, size, 2 * stride)
            for at in range(stride)
            for half in (0, 1)
        ]
        permutation = torch.eye(size).double()[order]
        product = permutation.T @ rotation(factor) @ permutation @ product
    return product


def through(*layers: Tensor) -> Tensor:
    """The kernel of convolutions one after another, of which one is larger than 1x1: what they say of impulses."""
    into = layers[0].shape[1]
    impulses = torch.zeros(into, into, 5, 5).double()
    impulses[range(into), range(into), 2, 2] = 1
    y = impulses
    for kernel in layers:
        y = nn.functional.conv2d(y, kernel, padding=kernel.shape[-1] // 2)
    return y[:, :, 1:4, 1:4].flip(2, 3).transpose(0, 1)


def formula(name: str, t: dict[str, Tensor], w: Tensor) -> Tensor:
    """The changed weight."""
    scale, ones = ALPHA / RANK, [1] * (w.ndim - 2)
    match name:
        case "lora tucker":
            return w + scale * through(t["lora_down.weight"], t["lora_mid.weight"], t["lora_up.weight"])
        case "glora":
            a = flat(t["a1.weight"]) @ flat(t["a2.weight"])
            within = torch.stack([w[:, :, i, j] @ a for i in range(3) for j in range(3)], -1) if ones else w @ a
            return w + scale * (within.reshape(w.shape) + (flat(t["b1.weight"]) @ flat(t["b2.weight"])).view(w.shape))
        case "glora tucker":
            a = flat(t["a1.weight"]) @ flat(t["a2.weight"])
            within = torch.stack([w[:, :, i, j] @ a for i in range(3) for j in range(3)], -1).view(w.shape)
            return w + scale * (within + through(t["b2.weight"], t["bm.weight"], t["b1.weight"]))
        case "oft":
            return (rotation(t["oft_blocks"]).T @ flat(w)).view(w.shape)
        case "oft rescaled":
            return t["rescale"] * (rotation(t["oft_blocks"]).T @ flat(w)).view(w.shape)
        case "boft":
            return (butterfly(t["oft_blocks"], len(w)) @ flat(w)).view(w.shape)
        case "old oft":
            return (block_diagonal(*t["oft_diag"]).T @ flat(w)).view(w.shape)
        case "ia3 of outputs":
            return (torch.diag(1 + t["weight"]) @ flat(w)).view(w.shape)
        case "ia3 of inputs":
            return torch.einsum("oi...,ij->oj...", w, torch.diag(1 + t["weight"]))
        case "full":
            return w + t["diff"]
        case "set":
            return t["set_weight"]
        case "dora of inputs":
            v = w + scale * (flat(t["lora_up.weight"]) @ flat(t["lora_down.weight"])).view(w.shape)
            lengths = torch.stack([v[:, i].norm() for i in range(w.shape[1])])
            return v / lengths.view(1, -1, *ones) * t["dora_scale"]
        case "dora of outputs":
            v = w + scale * (flat(t["lora_up.weight"]) @ flat(t["lora_down.weight"])).view(w.shape)
            return v / torch.stack([row.norm() for row in v]).view(-1, 1, *ones) * t["dora_scale"]
    raise AssertionError(name)


FORMULAS = (
    "glora", "oft", "oft rescaled", "boft", "old oft", "ia3 of outputs", "ia3 of inputs", "full", "set",
    "dora of inputs", "dora of outputs",
)  # fmt: skip
CASES = [(kind, name) for kind in SHAPES for name in FORMULAS] + [("conv", "lora tucker"), ("conv", "glora tucker")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_merged_weights_follow_the_formula(kind: str, name: str) -> None:
    shape = SHAPES[kind]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    tensors = tensors_of(name, shape, dtype=torch.float64)
    # ALPHA limits the rotations of OFT only beyond a norm of 32, which the examples do not reach.
    merged = weight + assembled(tensors, ALPHA, shape).difference(weight, 1.0)
    # float64 to rounding
    torch.testing.assert_close(merged, formula(name, tensors, weight), rtol=0, atol=1e-12)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_norms_and_biases_are_added(strength: float) -> None:
    weight, bias, more = torch.rand(8).double(), torch.rand(8).double(), torch.rand(2, 8).double()
    norm = assembled({"w_norm": more[0], "b_norm": more[1]}, None, (8,))
    assert torch.equal(weight + norm.difference(weight, strength), weight + strength * more[0])
    change = norm.bias_difference(bias, strength)
    assert change is not None
    assert torch.equal(change, strength * more[1])
