"""Packed weights compute as the unpacked ones do, to the bit, and stay packed."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.checkpoint.load import build
from reverie.checkpoint.packed import PackedTensor, is_packed, plain, unpack, unpacked
from reverie.checkpoint.quantised import BLOCKS, FLOAT8, QuantisedTensor

KINDS = [*BLOCKS, *FLOAT8, "F8_E4M3 with a scale", "F8_E4M3 with a scale a row"]


def packed(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> PackedTensor:
    """Random numbers, finite scales."""
    torch.manual_seed(0)
    name, _, scaled = kind.partition(" ")
    if name in FLOAT8:
        scale = (torch.rand(shape[0] if "row" in scaled else 1) + 0.1) if scaled else None
        return PackedTensor.of(QuantisedTensor(torch.randn(shape).to(FLOAT8[name]), name, shape, scale), dtype)
    block = BLOCKS[name]
    blocks = torch.randint(0, 256, (math.prod(shape) // block.elements, block.size), dtype=torch.uint8)
    half = blocks[:, block.scales]
    half[:] = (torch.rand(len(half), half.shape[1] // 2) * 0.01).half().view(torch.uint8)
    return PackedTensor.of(QuantisedTensor(blocks.flatten(), name, shape), dtype)


LAYERS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "linear": ((64, 256), lambda w: F.linear(torch.ones(3, 5, 256, dtype=w.dtype), w)),
    "convolution": (
        (8, 64, 2, 2),
        lambda w: F.conv2d(torch.ones(1, 64, 5, 5, dtype=w.dtype), w, torch.ones(8, dtype=w.dtype), padding=1),
    ),
    "rows of a table": ((16, 256), lambda w: F.embedding(torch.tensor([[1, 5, 1], [15, 0, 3]]), w)),
    "product": ((64, 256), lambda w: torch.ones(2, 256, dtype=w.dtype) @ w.T),
    "sum with another": ((4, 256), lambda w: torch.ones(4, 256, dtype=w.dtype) + 2 * w),
    "swapped halves": ((4, 256), lambda w: torch.cat(w.chunk(2)[::-1])),
    "transposed": ((4, 256), lambda w: w.t().contiguous()),
    "columns": ((4, 256), lambda w: torch.cat(w.chunk(2, dim=1))),
    "some rows": ((8, 256), lambda w: w[2:5] * 1),
    "widened": ((8, 256), lambda w: w.float()),
    "read by another": ((4, 256), lambda w: torch.zeros(4, 256).copy_(w)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", list(LAYERS))
@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_the_same_bits(kind: str, layer: str, dtype: torch.dtype) -> None:
    shape, compute = LAYERS[layer]
    weight = packed(kind, shape, dtype)
    plain_weight = weight.packed.dequantise(dtype)
    assert plain_weight.dtype == weight.dtype == dtype and weight.shape == shape
    found = compute(weight)
    assert type(found) is Tensor and found.dtype == compute(plain_weight).dtype
    assert torch.equal(found, compute(plain_weight))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_other_shapes_stay_packed(kind: str) -> None:
    weight = packed(kind, (6, 256))
    parts = weight.chunk(3)
    assert all(isinstance(part, PackedTensor) for part in parts)
    assert torch.equal(torch.cat(unpacked(list(parts))), weight.unpacked())
    assert sum(p.packed.nbytes for p in parts if isinstance(p, PackedTensor)) == weight.packed.nbytes
    kernel = weight.reshape(6, 64, 2, 2)
    assert isinstance(kernel, PackedTensor) and torch.equal(unpacked(kernel), weight.unpacked().reshape(6, 64, 2, 2))
    assert isinstance(kernel.flatten(1), PackedTensor)
    flat = weight.flatten()
    assert torch.equal(unpacked(flat), weight.unpacked().flatten())
    assert isinstance(flat, PackedTensor) != ("row" in kind)  # a scale a row needs its rows


def test_rows_that_are_no_whole_blocks_are_unpacked() -> None:
    weight = packed("Q4_0", (6, 16))
    assert torch.equal(torch.cat(weight.chunk(2)), weight.unpacked())
    assert torch.equal(F.embedding(torch.tensor([5, 2]), weight), weight.unpacked()[[5, 2]])


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.add_(1), lambda w: w.mul_(2), lambda w: w.copy_(torch.zeros(4, 32)), lambda w: w.zero_(),
        lambda w: w.__iadd__(1), lambda w: w.__setitem__(0, 1.0), lambda w: setattr(w, "data", torch.zeros(4, 32)),
        nn.init.zeros_,
    ],
)  # fmt: skip
def test_a_change_in_place_is_refused_not_lost(change: Callable[[Tensor], Any]) -> None:
    weight = packed("Q8_0", (4, 32))
    with pytest.raises(RuntimeError, match="cannot be changed in place"):
        change(weight)


class Net(nn.Module):
    """A table, a linear layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 32)
        self.linear = nn.Linear(32, 64)
        self.kernel = nn.Conv2d(64, 4, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.linear(self.table(ids))
        kept: Tensor = self.kernel(x.movedim(-1, 1)[..., None])
        return kept


def nets(dtype: torch.dtype) -> tuple[Net, Net]:
    """A network with packed weights, and one with the same weights unpacked and rounded to `dtype`."""
    weights: dict[str, Tensor] = {
        "table.weight": packed("Q8_0", (10, 32)), "linear.weight": packed("Q5_1", (64, 32)),
        "linear.bias": torch.rand(64), "kernel.weight": packed("F8_E5M2", (4, 64, 3, 3)), "kernel.bias": torch.rand(4),
    }  # fmt: skip
    return build(Net, weights, "net"), build(Net, unpacked(weights), "net").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_network_moves_with_its_weights_packed(dtype: torch.dtype) -> None:
    ours, plain_net = nets(dtype)
    ids = torch.tensor([[1, 2, 9]])
    before: Tensor = ours.linear.weight
    assert isinstance(before, PackedTensor)
    blocks = before.packed.data
    ours.to("cpu", dtype)
    assert is_packed(ours) and not is_packed(plain_net)
    after: Tensor = ours.linear.weight
    assert isinstance(after, nn.Parameter) and isinstance(after, PackedTensor)
    assert after.dtype == dtype and after.packed.data is blocks
    assert (ours.linear.in_features, ours.linear.out_features) == (32, 64)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in plain_net.parameters())
    with torch.no_grad():
        assert torch.equal(ours(ids), plain_net(ids))
        assert torch.equal(copy.deepcopy(ours)(ids), plain_net(ids))
    unpack(ours, dtype)
    assert not is_packed(ours)
    assert all(torch.equal(t, plain_net.state_dict()[name]) for name, t in ours.state_dict().items())


def test_a_deep_copy_stays_packed() -> None:
    ours, _ = nets(torch.float32)
    copied = copy.deepcopy(ours)
    assert isinstance(copied.linear.weight, PackedTensor) and isinstance(copied.linear.weight, nn.Parameter)
    assert copied.linear.weight is not ours.linear.weight


def test_gradients_pass_through() -> None:
    """A side branch is trained beside packed weights."""
    weight = packed("Q4_K", (8, 256))
    x = torch.randn(3, 256, requires_grad=True)
    F.linear(x, weight).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.unpacked().sum(0).expand(3, 256))


def test_other_types_and_devices() -> None:
    weight = packed("Q8_0", (4, 32))
    assert weight.to("cpu") is weight and weight.to(torch.float32) is weight
    moved = weight.to("meta", torch.float16)
    assert isinstance(moved, PackedTensor) and (moved.device.type, moved.dtype) == ("meta", torch.float16)
    assert moved.packed.data.is_meta
    assert torch.equal(weight.to(torch.int32), weight.unpacked().to(torch.int32))
    assert "PackedTensor([4, 32], Q8_0 as torch.float32)" in repr(weight)


def test_eight_bits_without_a_scale_are_a_plain_type() -> None:
    assert plain(packed("F8_E4M3", (4, 32))).dtype == torch.float8_e4m3fn
    for kind in ("F8_E4M3 with a scale", "Q8_0"):
        weight = packed(kind, (4, 32))
        assert plain(weight) is weight
