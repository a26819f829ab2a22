"""Weights are read once, named where they are unsound, and kept packed by one rule."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from reverie.checkpoint.packed import PackedTensor, is_packed
from reverie.checkpoint.quantised import QuantisedTensor
from reverie.engine import placing
from reverie.engine.memory import available
from reverie.engine.placing import check_numbers, keeps_packed, place
from reverie.errors import CheckpointError

CPU = torch.device("cpu")


def layer(weight: Tensor) -> nn.Module:
    net = nn.Linear(32, len(weight), bias=False)
    net.weight = nn.Parameter(weight, requires_grad=False)
    return net


def eight_bits(last: float = 1.0) -> PackedTensor:
    """Blocks of 32 numbers with a scale each; the last scale is given."""
    blocks = torch.ones(3, 34, dtype=torch.uint8)
    blocks[:, :2] = torch.tensor([[0.5], [0.25], [last]]).half().view(torch.uint8)
    return PackedTensor.of(QuantisedTensor(blocks.flatten(), "Q8_0", (3, 32)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_what_is_no_number_is_named(dtype: torch.dtype, bad: float) -> None:
    weight = torch.ones(5, 32)
    weight[3, 7] = bad
    with pytest.raises(CheckpointError, match=r"^m.ckpt: tensor weight of unet has NaN or infinite numbers"):
        check_numbers(layer(weight.to(dtype)), Path("m.ckpt"), "unet")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_of_packed_weights_the_scales_are_read(bad: float) -> None:
    check_numbers(layer(eight_bits()), Path("m.gguf"), "unet")
    with pytest.raises(CheckpointError, match="tensor weight of unet"):
        check_numbers(layer(eight_bits(bad)), Path("m.gguf"), "unet")
    floats = torch.ones(3, 32).to(torch.float8_e4m3fn)
    for numbers, scale in ((floats, torch.tensor(bad)), (torch.full((3, 32), torch.nan).to(floats), None)):
        weight = PackedTensor.of(QuantisedTensor(numbers, "F8_E4M3", (3, 32), scale))
        with pytest.raises(CheckpointError, match="tensor weight of unet"):
            check_numbers(layer(weight), Path("m"), "unet")


def test_numbers_whose_sum_is_too_large_are_sound() -> None:
    check_numbers(layer(torch.full((50, 32), 60000.0).half()), Path("m"), "unet")
    check_numbers(layer(torch.full((50, 32), 3e38)), Path("m"), "unet")


@pytest.mark.parametrize("packed", [True, False])
def test_weights_stay_packed_or_not(packed: bool) -> None:
    net, expected = layer(eight_bits()), eight_bits().packed.dequantise(torch.bfloat16)
    place(net, CPU, torch.bfloat16, packed=packed)
    assert is_packed(net) == packed
    weight = net.get_parameter("weight")
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight.packed.dequantise(weight.dtype) if isinstance(weight, PackedTensor) else weight, expected)


def test_nothing_is_copied_where_nothing_changes() -> None:
    net = layer(torch.ones(4, 32))
    before = net.get_parameter("weight").data_ptr()
    place(net, CPU, torch.float32)
    assert net.get_parameter("weight").data_ptr() == before


@pytest.mark.parametrize(
    ("weights", "free", "expected"),
    [
        ("packed", 10**9, True), ("full", 0, False), ("auto", 3 * 32 * 4 * 2, False),
        ("auto", 3 * 32 * 4 * 2 - 1, True), ("auto", 0, True),
    ],
)  # fmt: skip
def test_packed_where_memory_is_short(
    weights: placing.Weights, free: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows of 32 numbers in float32; they may take half of what is free."""
    monkeypatch.setattr(placing, "available", lambda device: free)
    assert keeps_packed(weights, [layer(eight_bits())], CPU, torch.float32) == expected


def test_plain_weights_are_not_asked_about() -> None:
    assert not keeps_packed("auto", [layer(torch.ones(3, 32))], CPU, torch.float32)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads Linux' account of memory")
def test_the_system_says_what_is_free() -> None:
    assert 1 << 20 < available(CPU) < 1 << 50
