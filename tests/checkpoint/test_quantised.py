"""Packed blocks unpack to the numbers of the reference implementation, to the bit."""

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from reverie.checkpoint.quantised import BLOCKS, CHUNK, FLOAT8, QuantisedTensor, widened


def packed(packing: str, blocks: int) -> Tensor:
    """Random bytes: every bit pattern of scales and numbers, NaN and infinity among the scales."""
    return torch.randint(0, 256, (blocks * BLOCKS[packing].size,), dtype=torch.uint8)


def reference(data: Tensor, packing: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        rows = data.numpy().reshape(-1, BLOCKS[packing].size)
        return np.asarray(gguf.quants.dequantize(rows, GGMLQuantizationType[packing])).reshape(-1)


@pytest.mark.parametrize("packing", BLOCKS)
def test_the_block_is_that_of_the_reference(packing: str) -> None:
    assert GGML_QUANT_SIZES[GGMLQuantizationType[packing]] == BLOCKS[packing][:2]


@pytest.mark.parametrize("packing", BLOCKS)
@pytest.mark.parametrize("blocks", [1, 3, 500])
def test_equal_to_the_reference_to_the_bit(packing: str, blocks: int) -> None:
    torch.manual_seed(blocks)
    data = packed(packing, blocks)
    expected = reference(data, packing)
    ours = QuantisedTensor(data, packing, (blocks, BLOCKS[packing].elements)).dequantise()
    assert ours.shape == (blocks, BLOCKS[packing].elements)
    assert ours.dtype == torch.float32
    found = ours.numpy().reshape(-1)
    equal = found.view(np.uint32) == expected.view(np.uint32)
    assert (equal | (np.isnan(found) & np.isnan(expected))).all()
    assert not np.isnan(expected).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_are_rounded_once(dtype: torch.dtype) -> None:
    tensor = QuantisedTensor(packed("Q6_K", 9), "Q6_K", (9, 256))
    assert tensor.dequantise(dtype).dtype == dtype
    assert torch.equal(tensor.dequantise(dtype).nan_to_num(), tensor.dequantise().to(dtype).nan_to_num())


def test_more_blocks_than_are_unpacked_at_once() -> None:
    data = packed("Q8_0", 2 * CHUNK + 5)
    whole = QuantisedTensor(data, "Q8_0", (2 * CHUNK + 5, 32)).dequantise()
    last = QuantisedTensor(data[-34 * 7 :], "Q8_0", (7, 32)).dequantise()
    assert torch.equal(whole[-7:].nan_to_num(), last.nan_to_num())


def test_no_blocks() -> None:
    empty = QuantisedTensor(torch.empty(0, dtype=torch.uint8), "Q4_0", (0, 32))
    assert empty.dequantise().shape == (0, 32)
    for shape in ((0, 32), (4, 0), ()):
        floats = QuantisedTensor(torch.ones(shape).to(torch.float8_e5m2), "F8_E5M2", shape)
        assert torch.equal(floats.dequantise(), torch.ones(shape))


def test_what_it_takes_in_memory() -> None:
    assert QuantisedTensor(packed("Q4_0", 100), "Q4_0", (100, 32)).nbytes == 1800
    assert QuantisedTensor(packed("Q4_0", 100), "Q4_0", (100, 32)).to("cpu").nbytes == 1800


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_8_bit_floats_times_their_scale(kind: torch.dtype) -> None:
    numbers = torch.randn(3, 4).to(kind)
    packing = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}[kind]
    rows = torch.tensor([0.5, 2.0, 3.0])
    for scale, expected in (
        (None, numbers.float()),
        (torch.tensor(0.37), numbers.float() * 0.37),
        (torch.tensor([0.37]), numbers.float() * 0.37),
        (rows, numbers.float() * rows[:, None]),
        (rows[:, None], numbers.float() * rows[:, None]),
        (rows.half(), numbers.float() * rows[:, None]),
    ):
        assert torch.equal(QuantisedTensor(numbers, packing, (3, 4), scale).dequantise(), expected)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_8_bit_float_is_widened_as_torch_does(kind: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(kind)
    ours, expected = widened(numbers), numbers.float()
    assert torch.equal(ours.isnan(), expected.isnan())
    bits = [t[~expected.isnan()].view(torch.int32) for t in (ours, expected)]
    assert torch.equal(*bits)  # the sign of zero, too


@pytest.mark.parametrize("packing", BLOCKS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_blocks_are_finite_where_their_scales_are(packing: str, bad: float) -> None:
    """The largest scales with any small integers give numbers; one that is none gives others that are none."""
    block = BLOCKS[packing]
    data = torch.randint(0, 256, (200, block.size), dtype=torch.uint8)
    scales = data[:, block.scales]
    scales[:] = torch.full((200, scales.shape[1] // 2), 65504.0).half().view(torch.uint8)
    sound = QuantisedTensor(data.flatten(), packing, (200, block.elements))
    assert sound.is_finite() and bool(sound.dequantise().isfinite().all())
    scales[7, -2:] = torch.tensor([bad]).half().view(torch.uint8)
    broken = QuantisedTensor(data.flatten(), packing, (200, block.elements))
    assert not broken.is_finite() and not bool(broken.dequantise().isfinite().all())


@pytest.mark.parametrize("packing", [*BLOCKS, *FLOAT8])
def test_some_rows(packing: str) -> None:
    which = torch.tensor([4, 0, 4])
    if packing in FLOAT8:
        whole = QuantisedTensor(torch.randn(5, 8).to(FLOAT8[packing]), packing, (5, 8), torch.rand(5, 1) + 1)
    else:
        block = BLOCKS[packing]
        whole = QuantisedTensor(packed(packing, 10), packing, (5, 2 * block.elements))
    rows = whole.rows(which)
    assert rows is not None and rows.shape == (3, *whole.shape[1:])
    assert torch.equal(rows.dequantise().nan_to_num(), whole.dequantise()[which].nan_to_num())


def test_rows_that_are_no_whole_blocks() -> None:
    assert QuantisedTensor(packed("Q8_0", 3), "Q8_0", (6, 16)).rows(torch.tensor([1])) is None
