"""Every algorithm: merged and beside the layer alike, its algebra, its tensors back, and what it refuses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reverie.adapters.deltas import (
    BOFT,
    DELTAS,
    ENDINGS,
    OFT,
    DoRA,
    GLoRA,
    InputBOFT,
    InputOFT,
    LoKr,
    LoRA,
    NormDifference,
    Sum,
    assembled,
)
from reverie.adapters.deltas.orthogonal import cayley, neumann
from reverie.errors import CheckpointError
from tests.adapters.kinds_of_change import ALPHA, LINEAR_NAMES, NAMES, change, conv, linear, merged_output, tensors_of

KERNELS = {"linear": (0, 1), "conv 3x3": (3, 1), "conv 3x3 stride 2": (3, 2), "conv 1x1": (1, 1)}
CASES = [(kind, name) for kind in KERNELS for name in (LINEAR_NAMES if kind == "linear" else NAMES)]


def layer_and_input(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    kernel, stride = KERNELS[kind]
    layer = conv(kernel, stride, dtype) if kernel else linear(dtype)
    torch.manual_seed(1)
    return layer, (torch.randn(2, 5, 8) if kind == "linear" else torch.randn(2, 8, 6, 6)).to(dtype)


def weight_of(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_branch_says_what_merging_adds(kind: str, name: str) -> None:
    layer, x = layer_and_input(kind)
    delta = change(name, weight_of(layer).shape, dtype=torch.float64)
    expected = merged_output(layer, delta, x, 0.7) - layer(x)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(delta.branch(layer, x, 0.7), expected, rtol=0, atol=1e-13)  # float64 to rounding


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_strength_scales_and_nothing_is_no_change(kind: str, name: str) -> None:
    weight = weight_of(layer_and_input(kind)[0])
    delta = change(name, weight.shape, dtype=torch.float64)
    one = delta.difference(weight, 1.0)
    assert one.shape == weight.shape
    torch.testing.assert_close(delta.difference(weight, -0.5), -0.5 * one)
    assert not delta.difference(weight, 0.0).any()
    torch.testing.assert_close(delta.added(weight, weight, 0.3), weight + 0.3 * one)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_its_tensors_make_it_again(kind: str, name: str) -> None:
    weight = weight_of(layer_and_input(kind, torch.float32)[0])
    delta = change(name, weight.shape)
    tensors = delta.tensors()
    assert set(tensors) <= ENDINGS
    alpha = tensors.pop("alpha", None)
    again = assembled(tensors, None if alpha is None else float(alpha), weight.shape)
    assert torch.equal(again.difference(weight, 1.0), delta.difference(weight, 1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_files_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    weight = weight_of(conv()).to(dtype)
    half = change(name, weight.shape, dtype=dtype)
    full = half.mapped(lambda t: t.float() if t.is_floating_point() else t)
    difference = half.difference(weight, 0.8)
    assert difference.dtype == torch.float32
    assert torch.equal(difference, full.difference(weight.float(), 0.8))


@pytest.mark.parametrize("name", NAMES)
def test_a_branch_answers_in_the_precision_of_the_layer(name: str) -> None:
    layer = conv(dtype=torch.bfloat16)
    x = torch.randn(1, 8, 4, 4, dtype=torch.bfloat16)
    delta = change(name, layer.weight.shape)
    said = delta.branch(layer, x, 1.0)
    assert said.dtype == torch.bfloat16
    exact = delta.branch(conv(), x.float(), 1.0)
    torch.testing.assert_close(said.float(), exact, rtol=0.05, atol=0.05)  # bfloat16 keeps 8 bits; a few roundings


def test_every_algorithm_has_an_example() -> None:
    shown = {ending for name in NAMES for ending in tensors_of(name, (16, 8, 3, 3))} | {"w_norm", "b_norm"}
    assert {ending for name in DELTAS for ending in DELTAS[name].endings} <= shown


# LoRA


@given(
    out=st.integers(1, 9), into=st.integers(1, 9), rank=st.integers(1, 20), alpha=st.none() | st.floats(0.1, 8),
    kernel=st.sampled_from([(), (1, 1), (3, 3)]), flat=st.booleans(),
)  # fmt: skip
def test_lora_of_any_shape(
    out: int, into: int, rank: int, alpha: float | None, kernel: tuple[int, ...], flat: bool
) -> None:
    if rank > 16 * max(out, into * math.prod(kernel)):
        rank = 1
    down, up = torch.randn(rank, into, *kernel).double(), torch.randn(out, rank, *(1 for _ in kernel)).double()
    tensors = {"lora_down.weight": down.flatten(1) if flat else down, "lora_up.weight": up.flatten(1) if flat else up}
    weight = torch.zeros(out, into, *kernel, dtype=torch.float64)
    expected = torch.einsum("or,ri...->oi...", up.flatten(1), down) * (1 if alpha is None else alpha / rank)
    torch.testing.assert_close(assembled(tensors, alpha, weight.shape).difference(weight, 1.0), expected)


def test_alpha_zero_is_the_rank() -> None:
    weight = torch.zeros(16, 8)
    tensors = tensors_of("lora", weight.shape)
    plain, zero = (assembled(tensors, alpha, weight.shape).difference(weight, 1.0) for alpha in (None, 0.0))
    assert torch.equal(plain, zero)


def test_rank_larger_than_the_layer() -> None:
    weight = torch.zeros(16, 8)
    delta = assembled({"lora_down.weight": torch.ones(64, 8), "lora_up.weight": torch.ones(16, 64)}, None, weight.shape)
    assert delta.rank == 64
    assert torch.equal(delta.difference(weight, 1.0), torch.full_like(weight, 64.0))


@pytest.mark.parametrize("shape", [(16, 8), (16, 8, 3, 3)])
def test_a_fresh_lora_changes_nothing_and_learns(shape: tuple[int, ...]) -> None:
    fresh = LoRA.fresh(shape, 4, 2.0, torch.Generator().manual_seed(3))
    again = LoRA.fresh(shape, 4, 2.0, torch.Generator().manual_seed(3))
    weight = torch.randn(shape)
    assert torch.equal(fresh.down, again.down) and fresh.down.abs().max() <= (8 * math.prod(shape[2:])) ** -0.5
    assert not fresh.difference(weight, 1.0).any()
    trained = fresh.mapped(nn.Parameter)
    (gradient,) = torch.autograd.grad(trained.difference(weight, 1.0).sum(), [trained.up])
    assert gradient.any()


def test_rows_of_a_fused_layer() -> None:
    weight = torch.randn(16, 8)
    for name in ("lora", "lora with bias", "full", "only bias"):
        delta = change(name, weight.shape)
        part = delta.rows(slice(4, 12))
        torch.testing.assert_close(part.difference(weight[4:12], 1.0), delta.difference(weight, 1.0)[4:12])
    with pytest.raises(CheckpointError, match="LoKr of several layers in one"):
        change("lokr", weight.shape).rows(slice(0, 4))


# Others


def test_glora_in_both_orders() -> None:
    weight = torch.randn(16, 8)
    new = tensors_of("glora", weight.shape)
    swap = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    old = {f"{swap[name.split('.')[0]]}.weight": t for name, t in new.items()}
    one, other = (assembled(tensors, ALPHA, weight.shape) for tensors in (new, old))
    assert isinstance(other, GLoRA)
    assert torch.equal(one.difference(weight, 1.0), other.difference(weight, 1.0))


def test_lokr_of_two_whole_factors_has_no_scale() -> None:
    weight = torch.zeros(16, 8)
    tensors = tensors_of("lokr", weight.shape)
    delta = assembled(tensors, 0.25, weight.shape)
    assert isinstance(delta, LoKr) and delta.rank is None
    torch.testing.assert_close(delta.difference(weight, 1.0), torch.kron(tensors["lokr_w1"], tensors["lokr_w2"]))


@pytest.mark.parametrize("name", ["oft", "boft", "old oft", "input oft", "input boft"])
def test_rotations_keep_lengths(name: str) -> None:
    weight = torch.randn(16, 8).double()
    delta = change(name, weight.shape, dtype=torch.float64)
    if isinstance(delta, InputOFT):  # peft's series is not quite a rotation
        delta = InputOFT(delta.vectors, terms=0)
    if isinstance(delta, OFT):
        delta = type(delta)(delta.blocks)
    if isinstance(delta, InputBOFT):
        delta = InputBOFT(delta.blocks)
    turned = weight + delta.difference(weight, 1.0)
    axis = 1 if name.startswith("input") else 0
    torch.testing.assert_close(turned.norm(dim=axis), weight.norm(dim=axis))
    assert (turned - weight).abs().max() > 0.01


def test_a_butterfly_reaches_further_than_its_blocks() -> None:
    weight = torch.eye(16).double()
    blocks = torch.randn(3, 4, 4, 4).double()
    reached = [
        int((weight + BOFT(blocks[:m]).difference(weight, 1.0)).abs().gt(1e-9).sum(dim=0).max()) for m in (1, 2, 3)
    ]
    assert reached == [4, 8, 16]


def test_oft_is_held_back_by_alpha() -> None:
    weight = torch.randn(16, 8)
    blocks = tensors_of("oft", weight.shape)["oft_blocks"]
    free, held = (OFT(blocks, alpha=alpha).difference(weight, 1.0).norm() for alpha in (0.0, 1e-3))
    assert held < 0.1 * free
    skew = blocks - blocks.mT
    exact = OFT(blocks / skew.norm() * 1e-3 * 16).difference(weight, 1.0)
    torch.testing.assert_close(OFT(blocks, alpha=1e-3).difference(weight, 1.0), exact, rtol=1e-3, atol=1e-6)


def test_the_series_nears_cayleys_transform() -> None:
    raw = torch.randn(2, 6, 6).double() * 0.02
    skew = raw - raw.mT
    errors = [float((neumann(skew, terms) - cayley(-skew)).abs().max()) for terms in (2, 3, 5, 9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-7


def test_dora_sets_the_lengths() -> None:
    weight = torch.randn(16, 8).double()
    tensors = tensors_of("dora of outputs", weight.shape, dtype=torch.float64)
    changed = weight + assembled(tensors, ALPHA, weight.shape).difference(weight, 1.0)
    torch.testing.assert_close(changed.norm(dim=1, keepdim=True), tensors["dora_scale"].abs())
    tensors = tensors_of("dora of inputs", weight.shape, dtype=torch.float64)
    changed = weight + assembled(tensors, ALPHA, weight.shape).difference(weight, 1.0)
    torch.testing.assert_close(changed.norm(dim=0, keepdim=True), tensors["dora_scale"].abs())


def test_dora_of_a_square_layer_goes_by_the_shape() -> None:
    shape = (8, 8, 3, 3)
    lora = tensors_of("lora", shape)
    for scale, axis in ((torch.ones(1, 8, 1, 1), 1), (torch.ones(8, 1, 1, 1), 0)):
        delta = assembled(lora | {"dora_scale": scale}, None, shape)
        assert isinstance(delta, DoRA) and delta.magnitude.shape[axis] == 8
    peft = assembled(lora | {"lora_magnitude_vector": torch.ones(1, 8, 1, 1)}, None, shape)
    assert isinstance(peft, DoRA) and peft.magnitude.shape[0] == 8


def test_a_norm_and_its_bias() -> None:
    delta = assembled({"w_norm": torch.ones(8), "b_norm": torch.full((8,), 2.0)}, None, (8,))
    assert isinstance(delta, NormDifference)
    assert torch.equal(delta.difference(torch.zeros(8), 0.5), torch.full((8,), 0.5))
    bias = delta.bias_difference(torch.zeros(8), 0.5)
    assert bias is not None and torch.equal(bias, torch.ones(8))


def test_a_sum_is_the_sum() -> None:
    weight = torch.randn(16, 8).double()
    parts = [change(name, weight.shape, dtype=torch.float64) for name in ("lora", "oft", "full")]
    together = Sum(tuple(parts)).difference(weight, 0.6)
    torch.testing.assert_close(together, torch.stack([part.difference(weight, 0.6) for part in parts]).sum(dim=0))
    with pytest.raises(CheckpointError, match="two changes of one kind"):
        Sum((parts[0], parts[0])).tensors()


# What is refused

SHAPE = (16, 8)
BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "ranks differ": (
        {"lora_down.weight": torch.ones(3, 8), "lora_up.weight": torch.ones(16, 4)},
        "lora_down.weight of 3 x 8 and lora_up.weight of 16 x 4 make no weight of 16 x 8",
    ),
    "other layer": ({"lora_down.weight": torch.ones(3, 9), "lora_up.weight": torch.ones(16, 3)}, "make no weight"),
    "absurd rank": (
        {"lora_down.weight": torch.ones(999, 8), "lora_up.weight": torch.ones(16, 999)},
        "rank 999 for a layer of 16 x 8",
    ),
    "no rank": ({"lora_down.weight": torch.ones(0, 8), "lora_up.weight": torch.ones(16, 0)}, "rank 0"),
    "flat": ({"lora_down.weight": torch.ones(8), "lora_up.weight": torch.ones(16)}, "rank 0"),
    "half of it": ({"lora_down.weight": torch.ones(3, 8)}, "lora_down.weight without lora_up.weight"),
    "core misfit": (
        {"lora_down.weight": torch.ones(3, 8), "lora_up.weight": torch.ones(16, 3),
         "lora_mid.weight": torch.ones(2, 2)},
        "make no weight",
    ),
    "enlarged": (
        {"lora_down.weight": torch.ones(3, 8), "lora_up.weight": torch.ones(16, 3),
         "reshape_weight": torch.tensor([16, 12])},
        "enlarges this layer of 16 x 8 to 16 x 12",
    ),
    "nan": ({"diff": torch.full((16, 8), math.nan)}, "diff holds NaN or infinity"),
    "infinite": ({"diff_b": torch.full((16,), math.inf)}, "diff_b holds NaN or infinity"),
    "loha": (tensors_of("loha", SHAPE) | {"hada_w2_b": torch.ones(3, 9)}, "hada_w2_a of 16 x 3 and hada_w2_b of 3 x 9"),
    "loha ranks": (tensors_of("loha", SHAPE) | {"hada_w2_a": torch.ones(16, 2)}, "hada_w2_a of 16 x 2"),
    "lokr without a factor": ({"lokr_w1": torch.ones(2, 2)}, "LoKr lacks one of its factors"),
    "lokr sizes": ({"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(8, 5)}, "make no weight of 16 x 8"),
    "lokr factors": (
        {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(8, 2), "lokr_w2_b": torch.ones(3, 4)},
        "do not fit one another",
    ),
    "glora": (tensors_of("glora", SHAPE) | {"b1.weight": torch.ones(15, 3)}, "factors of GLoRA"),
    "glora flat": (tensors_of("glora", SHAPE) | {"a1.weight": torch.ones(24)}, "factors of GLoRA"),
    "oft": ({"oft_blocks": torch.ones(5, 3, 3)}, "oft_blocks of 5 x 3 x 3 do not divide a weight of 16 x 8"),
    "boft": ({"oft_blocks": torch.ones(5, 4, 4, 4)}, "do not divide"),
    "oft rescale": ({"oft_blocks": torch.ones(4, 4, 4), "rescale": torch.ones(8, 1)}, "do not divide"),
    "old oft": ({"oft_diag": torch.ones(4, 4, 3)}, "oft_diag of 4 x 4 x 3"),
    "input oft": ({"oft_R.weight": torch.ones(2, 5)}, "oft_R.weight of 2 x 5"),
    "input boft": ({"boft_R": torch.ones(1, 2, 3, 3)}, "boft_R of 1 x 2 x 3 x 3"),
    "ia3": ({"weight": torch.ones(9), "on_input": torch.tensor(1)}, "9 numbers for the 8 inputs"),
    "ia3 alone": ({"weight": torch.ones(8)}, "weight without on_input"),
    "peft ia3": ({"ia3_l": torch.ones(9, 1)}, "ia3_l of 9 x 1"),
    "full": ({"diff": torch.ones(8, 8)}, "diff of 8 x 8 is no difference of a weight of 16 x 8"),
    "set": ({"set_weight": torch.ones(8, 16)}, "set_weight of 8 x 16"),
    "dora": (tensors_of("lora", SHAPE) | {"dora_scale": torch.ones(9, 1)}, "magnitudes of 9 x 1"),
    "dora of peft": (tensors_of("lora", SHAPE) | {"lora_magnitude_vector": torch.ones(8)}, "magnitudes of 8"),
    "magnitudes alone": ({"dora_scale": torch.ones(16, 1)}, "dora_scale: no known change"),
    "strange": ({"diff": torch.ones(16, 8), "lora_left.weight": torch.ones(1)}, "lora_left.weight: no known change"),
    "nothing": ({}, "no tensor: no known change"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tensors_are_refused_in_one_line(case: str) -> None:
    tensors, message = BROKEN[case]
    with pytest.raises(CheckpointError, match=message) as refused:
        assembled(tensors, None, SHAPE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_alpha_must_be_a_number(alpha: float) -> None:
    with pytest.raises(CheckpointError, match="alpha is"):
        assembled(tensors_of("lora", SHAPE), alpha, SHAPE)


def test_large_half_numbers_are_no_infinity() -> None:
    tensors = {"diff": torch.full((16, 8), 60000.0, dtype=torch.float16)}
    assert assembled(tensors, None, SHAPE).difference(torch.zeros(SHAPE), 1.0).max() == 60000
