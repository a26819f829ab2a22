"""Weights quantised as they are opened: their error, their memory, and products in 8 bits against plain arithmetic."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.checkpoint.packed import PackedTensor, is_packed
from reverie.checkpoint.quantised import NUMBERS, QuantisedTensor, products_in_bytes, rounded
from reverie.checkpoint.quantising import PACKINGS, Quantisation, quantise, quantised

CPU = torch.device("cpu")
KINDS: tuple[Quantisation, ...] = ("fp8", "int8", "int4")
# Relative error (root mean square) of normal numbers. A step between integers is 1/127 of the largest of a row, near
# 3.4 deviations of 1024 numbers: 0.027 / sqrt(12) = 0.008. e4m3 has steps of 1/8 to 1/16 of a number: 0.026. Q4_0 has
# steps of 1/8 of the largest of 32, near 2.1 deviations: 0.26 / sqrt(12) = 0.076. Each with a third more.
ERRORS: Mapping[Quantisation, float] = {"fp8": 0.035, "int8": 0.011, "int4": 0.1}
SIZES: Mapping[Quantisation, float] = {"fp8": 1, "int8": 1, "int4": 18 / 32}  # bytes a weight, without scales of rows


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 1024), (16, 32, 3, 3)])
def test_weights_are_near_and_small(kind: Quantisation, shape: tuple[int, ...]) -> None:
    weight = numbers(*shape) * torch.logspace(-3, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    packed = quantised(weight, kind)
    assert packed.shape == shape
    assert packed.nbytes == SIZES[kind] * weight.numel()
    for found, exact in zip(packed.dequantise(), weight, strict=True):  # each row by itself, small or large
        assert relative(found, exact) < ERRORS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_no_number_is_further_off_than_documented(kind: Quantisation) -> None:
    weight = numbers(8, 256, seed=3)
    off = (quantised(weight, kind).dequantise() - weight).abs()
    largest = weight.abs().amax(1, keepdim=True)
    # Float16 holds the scale of Q4_0: a thousandth more. Its positive numbers end at 7/8 of the largest in size.
    groups = weight.reshape(8, -1, 32).abs().amax(2, keepdim=True).expand(8, -1, 32).flatten(1)
    fp8 = weight.abs() / 16 + largest / 448 * 2**-10  # the second where numbers are below the smallest normal one
    bounds = {"int8": largest / 254, "int4": groups / 8, "fp8": fp8}
    assert (off <= bounds[kind] * 1.002).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: Quantisation) -> None:
    assert torch.equal(quantised(torch.zeros(3, 64), kind).dequantise(), torch.zeros(3, 64))


def test_q4_0_is_ggmls() -> None:
    """Against the table of ggml's own Python package."""
    gguf = pytest.importorskip("gguf")
    weight = numbers(6, 96)
    exact = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(quantised(weight, "int4").data, torch.from_numpy(exact).flatten())


# Products


def emulated(x: Tensor, weight: QuantisedTensor) -> Tensor:
    """The same product of numbers that were rounded and scaled back, in float64."""
    data, scale = rounded(x, weight.packing)
    return (data.double() * scale.double()) @ weight.dequantise().double().T


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("scales", ["rows", "one"])
def test_products_equal_quantise_dequantise(kind: Quantisation, scales: str) -> None:
    """Integers add up exactly, and two scales are rounded; sums of 8-bit floats are given in bfloat16."""
    weight = quantised(numbers(32, 64), kind)
    if scales == "one":
        weight = QuantisedTensor(weight.data, weight.packing, weight.shape, torch.tensor(0.01))
    x = numbers(20, 64, seed=1) * torch.logspace(-2, 2, 20)[:, None]
    found, exact = weight.multiplied(x).double(), emulated(x, weight)
    tolerance = 1e-6 if kind == "int8" else 2**-8
    largest = exact.abs().amax(1, keepdim=True)  # of a row: single sums may cancel
    assert ((found - exact).abs() / largest).max() < tolerance


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_linear_layers_multiply_in_bytes_where_they_may(kind: Quantisation) -> None:
    linear = nn.Linear(64, 32).requires_grad_(False)
    exact = linear.weight.clone()
    weight = quantised(exact, kind)
    x = numbers(2, 20, 64, seed=2)
    own = F.linear(x, exact, linear.bias)
    found = {}
    for products in (False, True):
        packed = QuantisedTensor(weight.data, weight.packing, weight.shape, weight.scale, products)
        linear.weight = nn.Parameter(PackedTensor.of(packed), requires_grad=False)
        found[products] = linear(x)
        assert found[products].shape == own.shape and found[products].dtype == x.dtype
    rows = emulated(x.flatten(0, 1), weight).reshape(own.shape).float() + linear.bias
    assert relative(found[True], rows) < (1e-6 if kind == "int8" else 2**-8)
    assert not torch.equal(found[False], found[True])
    # Errors of weights and of inputs are independent: the root of the sum of their squares.
    assert relative(found[False], own) < ERRORS[kind] < 1.5 * ERRORS[kind]
    assert relative(found[True], own) < 1.5 * ERRORS[kind]


def test_few_rows_and_odd_sizes_are_unpacked() -> None:
    """Libraries refuse them; the answer is that of unpacked weights, to the bit."""
    for shape, rows in (((32, 64), 3), ((20, 64), 30)):
        weight = quantised(numbers(*shape), "int8")
        packed = QuantisedTensor(weight.data, weight.packing, weight.shape, weight.scale, products=True)
        x = numbers(rows, 64)
        assert torch.equal(F.linear(x, PackedTensor.of(packed)), F.linear(x, weight.dequantise()))


def test_moving_keeps_the_way_of_multiplying() -> None:
    packed = QuantisedTensor(torch.zeros(4, 32, dtype=torch.int8), "I8", (4, 32), torch.ones(4), products=True)
    tensor = PackedTensor.of(packed).to(torch.bfloat16)
    assert isinstance(tensor, PackedTensor) and tensor.packed.products
    half = tensor.chunk(2)[0]
    assert isinstance(half, PackedTensor) and half.packed.products and half.packed.data.dtype == torch.int8


@pytest.mark.parametrize(
    ("vnni", "packing", "expected"), [(True, "I8", True), (False, "I8", False), (True, "F8_E4M3", False)]
)
def test_processors_that_multiply_bytes(
    vnni: bool, packing: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    assert products_in_bytes(packing, CPU) == expected


@pytest.mark.parametrize(
    ("capability", "floats", "integers"), [((7, 0), False, False), ((8, 0), False, True), ((9, 0), True, True)]
)
def test_cards_that_multiply_bytes(
    capability: tuple[int, int], floats: bool, integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    card = torch.device("cuda")
    assert (products_in_bytes("F8_E4M3", card), products_in_bytes("I8", card)) == (floats, integers)
    assert not products_in_bytes("Q4_0", card)


# Networks


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "conv_in": nn.Conv2d(4, 32, 3),
        "time_embedding": nn.ModuleDict({"linear_1": nn.Linear(32, 64)}),
        "down": nn.ModuleList([nn.Conv2d(32, 32, 3), nn.Linear(64, 32), nn.GroupNorm(4, 32), nn.Linear(24, 32)]),
        "proj_out": nn.Linear(32, 32),
    }
    return nn.ModuleDict(layers).requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_a_network_stay_as_they_are(kind: Quantisation) -> None:
    module = network()
    before = dict(module.named_parameters())
    quantise(module, kind, CPU, torch.bfloat16)
    packed = {name for name, p in module.named_parameters() if isinstance(p, PackedTensor)}
    assert packed == {"down.0.weight", "down.1.weight"}  # rows of 24 numbers are no groups of 32
    for name, p in module.named_parameters():
        assert p.dtype == torch.bfloat16 if name in packed else p is before[name]


def test_what_was_packed_is_packed_again() -> None:
    layer = nn.Linear(64, 32).requires_grad_(False)
    first = quantised(layer.weight, "int8")
    layer.weight = nn.Parameter(PackedTensor.of(first), requires_grad=False)
    quantise(nn.ModuleDict({"layer": layer}), "int4", CPU, torch.float32)
    assert isinstance(layer.weight, PackedTensor) and layer.weight.packed.packing == PACKINGS["int4"]
    assert torch.equal(layer.weight.packed.data, quantised(first.dequantise(), "int4").data)
    assert is_packed(layer) and set(PACKINGS.values()) - set(NUMBERS) == {"Q4_0"}
