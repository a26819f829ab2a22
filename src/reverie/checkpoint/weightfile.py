"""A weight file of any layout as a table of tensors that are views of the mapped file.

Every reader of this folder checks its header and describes each tensor by a `TensorInfo`; what is common to all of
them (views, alignment, packed numbers) is here.
"""

import math
import mmap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from reverie.checkpoint.packed import PackedTensor
from reverie.checkpoint.quantised import FLOAT8, PACKINGS, QuantisedTensor
from reverie.errors import CheckpointError

MAX_DIMENSIONS = 64  # what numpy and most of torch can do
MAX_BYTES = 2**63 - 1  # of a tensor, zero-sized dimensions counted as one: what torch can address
SHOWN = 60  # characters of a name from a file that go into a message


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        dtype: of what `WeightFile.tensor` gives.
        shape: as torch counts it, the last dimension running fastest where there is no `stride`.
        start: first byte of its storage, counted from `WeightFile.data`.
        end: byte after its storage.
        stride: in elements; None for a tensor that fills its storage row by row.
        offset: in elements of the storage, where the first element of a strided tensor is.
        conjugated: complex numbers stand conjugated in the file, as torch writes `x.conj()`.
        negated: numbers stand negated in the file, as torch writes `x.conj().imag`.
        packing: how the numbers are packed (`"Q4_K"`, `"F8_E4M3"`), None where they are stored as `dtype`.
        scale: what packed 8-bit floats are multiplied with.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    stride: tuple[int, ...] | None = None
    offset: int = 0
    conjugated: bool = False
    negated: bool = False
    packing: str | None = None
    scale: "TensorInfo | None" = None

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightFile:
    """A checked weight file.

    Attributes:
        path: where it is.
        tensors: by name, in the order of the file.
        metadata: texts beside the tensors; of a torch file its small values (`global_step`), the table that was taken
            (`wrapper`) and the tables that were not (`left_out`).
        data: where offsets begin, in bytes.
        format: `"safetensors"`, `"torch"` (zip), `"torch-legacy"` or `"gguf"`.
        foreign: what the code inside a pickle would have called, had it been executed.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data: int
    _map: mmap.mmap = field(repr=False)
    format: str = "safetensors"
    foreign: tuple[str, ...] = ()
    _copies: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers of one tensor, on the CPU.

        Stored numbers are a view of the mapped file: no copy, and writing to it changes this process's copy of the
        page, never the file. Packed numbers are computed anew at each call, in float32 unless `dtype` says otherwise.
        """
        info = self.tensors[name]
        stored = self.raw(name)
        if isinstance(stored, QuantisedTensor):
            return stored.dequantise(dtype or info.dtype)
        return stored if dtype is None else stored.to(dtype)

    def weight(self, name: str) -> Tensor:
        """One tensor as a network keeps it: a view, and packed numbers stay packed until they are used."""
        stored = self.raw(name)
        if isinstance(stored, QuantisedTensor):
            return PackedTensor.of(stored, self.tensors[name].dtype)
        packing = PACKINGS.get(stored.dtype)
        return stored if packing is None else PackedTensor.of(QuantisedTensor(stored, packing, tuple(stored.shape)))

    def raw(self, name: str) -> Tensor | QuantisedTensor:
        """The tensor as the file holds it, a view: packed blocks stay packed."""
        info = self.tensors[name]
        if info.packing is None:
            return self._view(info)
        if info.packing not in FLOAT8:
            return QuantisedTensor(self._bytes(info), info.packing, info.shape)
        scale = None if info.scale is None else self._view(info.scale)
        return QuantisedTensor(self._view(replace(info, dtype=FLOAT8[info.packing])), info.packing, info.shape, scale)

    def _view(self, info: TensorInfo) -> Tensor:
        stride = _row_major(info.shape) if info.stride is None else info.stride
        if info.count == 0:
            return torch.empty_strided(info.shape, stride, dtype=info.dtype)
        view = self._flat(info).as_strided(info.shape, stride, info.offset)
        view = view.conj() if info.conjugated else view
        return torch._neg_view(view) if info.negated else view

    def _flat(self, info: TensorInfo) -> Tensor:
        """The storage of a tensor. Numbers that do not begin where the processor wants them are copied first."""
        start, size = self.data + info.start, info.dtype.itemsize
        if start % size == 0:
            return torch.frombuffer(self._map, dtype=info.dtype, count=(info.end - info.start) // size, offset=start)
        key = (info.start, info.end)
        copied = self._copies.get(key)
        if copied is None:
            end = self.data + info.end - (info.end - info.start) % size
            copied = torch.frombuffer(bytearray(memoryview(self._map)[start:end]), dtype=torch.uint8)
            if key in self._shared:  # two tensors of one storage share memory after the copy, too
                self._copies[key] = copied
        return copied.view(info.dtype)

    def _bytes(self, info: TensorInfo) -> Tensor:
        if info.start == info.end:
            return torch.empty(0, dtype=torch.uint8)
        count = info.end - info.start
        return torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=self.data + info.start)

    @cached_property
    def _shared(self) -> frozenset[tuple[int, int]]:
        uses = Counter((info.start, info.end) for info in self.tensors.values())
        return frozenset(key for key, times in uses.items() if times > 1)


def check_name(path: Path, name: str) -> None:
    """Refuse a tensor name that would spoil a message.

    Raises:
        CheckpointError: control characters in it.
    """
    if not name.isprintable():
        raise CheckpointError(f"the header of {path} has a tensor name with control characters: {shown(name)}")


def check_size(path: Path, name: str, info: TensorInfo) -> None:
    """Refuse a shape that no memory holds.

    Raises:
        CheckpointError: too many dimensions or elements.
    """
    if len(info.shape) > MAX_DIMENSIONS or math.prod(max(n, 1) for n in info.shape) * info.dtype.itemsize > MAX_BYTES:
        raise CheckpointError(f"{path}: tensor {shown(name)} has an impossible shape {shown_shape(info.shape)}")


def shown(name: str) -> str:
    """A text from a file, quoted, short and on one line."""
    return repr(name if len(name) <= SHOWN else f"{name[:SHOWN]}...")


def shown_shape(shape: tuple[int, ...]) -> str:
    """A shape from a file, short."""
    text = str(list(shape[:6]))
    return text if len(shape) <= 6 and len(text) <= SHOWN else f"{text[:SHOWN].rstrip(']')}, ...]"


def map_file(path: Path) -> mmap.mmap:
    """The file in memory, pages read when they are first touched and copied when they are written to.

    Raises:
        CheckpointError: it cannot be mapped.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # larger than memory and swap, where the system does not overcommit
        raise CheckpointError(f"cannot map {path}: {getattr(error, 'strerror', None) or error}") from None


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * max(n, 1))
    return tuple(reversed(strides[: len(shape)]))
