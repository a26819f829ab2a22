"""Files of `torch.save`: the zip archive (torch 1.6 and later) and the stream of pickles (before).

Both hold one pickle that describes tensors by their storages, and the bytes of the storages. The pickle is read by
`reverie.checkpoint.pickled`, which executes nothing; the tensors are views of the mapped file. In the archive the
entry `data/<key>` is a storage; in the stream the storages follow the pickles, in the order of a list of their keys,
each behind its number of elements.
"""

import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from reverie.checkpoint.archive import Entry, read_archive
from reverie.checkpoint.inert import FormatError, Rebuilt, Storage, Unknown, brief
from reverie.checkpoint.pickled import read_pickle
from reverie.checkpoint.weightfile import TensorInfo, WeightFile, check_name, check_size, shown, shown_shape
from reverie.errors import CheckpointError

MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py: MAGIC_NUMBER
PROTOCOL = 1001  # torch/serialization.py: PROTOCOL_VERSION
# What real files put around their table of tensors: Lightning and LDM, Keras-like trainers, ESRGAN, DeepSpeed.
WRAPPERS = ("state_dict", "model_state_dict", "params_ema", "params", "model", "module")
MAX_WRAPPERS = 4
MAX_DEPTH = 32  # of tables in tables
MAX_VISITS = 1_000_000  # of values that are looked at
SMALL = 4  # visits for what becomes a text
MAX_EXPANDED = 1 << 26  # bytes of a tensor that repeats its storage, unless the file itself is larger
MAX_LISTED = 200  # values of a list, and characters of each, that are kept beside the tensors

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32",
        "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
        "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2",
    )
    if hasattr(torch, name)
}  # fmt: skip

Place = Callable[[Storage], tuple[int, int]]  # a storage -> its first byte, and the byte after its last


def open_archive(path: Path, data: mmap.mmap) -> WeightFile:
    """A zip archive of torch.

    Raises:
        CheckpointError: no such archive, broken or hostile.
    """
    try:
        entries = read_archive(data)
        root = _root(entries)
        pickle = _stored(entries, f"{root}/data.pkl")
        order = entries.get(f"{root}/byteorder")
        if order and data[order.start : order.end] != b"little":
            raise FormatError("its numbers are big-endian, which is not read; save it again on another machine")
        read = read_pickle(data, pickle.start, pickle.end)

        def place(storage: Storage) -> tuple[int, int]:
            entry = _stored(entries, f"{root}/data/{storage.key}")
            return entry.start, entry.end

        tensors, metadata = _collect(path, read.value, place, len(data))
    except FormatError as reason:
        raise CheckpointError(f"cannot read {path}: {reason}") from None
    return WeightFile(path, tensors, metadata, 0, data, "torch", read.foreign)


def open_stream(path: Path, data: mmap.mmap) -> WeightFile:
    """A stream of pickles, as torch before 1.6 wrote it.

    Raises:
        CheckpointError: no such stream, broken or hostile.
    """
    try:
        magic = read_pickle(data)
        if magic.value != MAGIC:
            raise FormatError("it looks like a Python pickle that torch did not write")
        protocol = read_pickle(data, magic.end)
        system = read_pickle(data, protocol.end)
        if protocol.value != PROTOCOL or not isinstance(system.value, dict):
            raise FormatError(f"it is a torch file of the unknown version {brief(protocol.value)}")
        if system.value.get("little_endian") is not True:
            raise FormatError("its numbers are big-endian, which is not read; save it again on another machine")
        read = read_pickle(data, system.end)
        places = _places(data, read_pickle(data, read.end), read.storages)
        tensors, metadata = _collect(path, read.value, lambda storage: _find(places, storage.key), len(data))
    except FormatError as reason:
        raise CheckpointError(f"cannot read {path}: {reason}") from None
    return WeightFile(path, tensors, metadata, 0, data, "torch-legacy", read.foreign)


def _root(entries: Mapping[str, Entry]) -> str:
    """The folder that all of an archive is in."""
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if not roots:
        names = ", ".join(shown(name) for name in list(entries)[:3]) or "nothing"
        raise FormatError(f"it is a zip archive but no PyTorch .ckpt or .pt file: it holds {names}; unpack it")
    if len(roots) > 1:
        raise FormatError(f"it is a zip archive with {len(roots)} entries data.pkl; a torch file has one")
    if f"{roots[0]}/constants.pkl" in entries:
        raise FormatError("it is a TorchScript program, not a table of weights; save its state_dict()")
    return roots[0]


def _stored(entries: Mapping[str, Entry], name: str) -> Entry:
    entry = entries.get(name)
    if entry is None:
        raise FormatError(f"it has no entry {shown(name)}, which its pickle names; download it again")
    if entry.method:
        raise FormatError(f"its entry {shown(name)} is compressed, which torch never does; unpack it and save it again")
    return entry


def _places(data: mmap.mmap, keys: Any, storages: Mapping[str, Storage]) -> dict[str, tuple[int, int]]:
    """Where each storage of a stream lies, given the pickled list of their keys."""
    if not isinstance(keys.value, list):
        raise FormatError("its list of storages is broken")
    places, position = {}, keys.end
    for key in keys.value:
        storage = storages.get(key if isinstance(key, str) else brief(key))
        if storage is None or position + 8 > len(data):
            raise FormatError("its list of storages is broken, or it is cut short; download it again")
        count = int.from_bytes(data[position : position + 8], "little", signed=True)
        start = position + 8
        position = start + count * _itemsize(storage)
        if count < 0 or position > len(data):
            raise FormatError(f"it is cut short: storage {shown(storage.key)} does not fit in it; download it again")
        places[storage.key] = (start, position)
    return places


def _find(places: Mapping[str, tuple[int, int]], key: str) -> tuple[int, int]:
    if key not in places:
        raise FormatError(f"it has no storage {shown(key)}, which its pickle names")
    return places[key]


def _itemsize(storage: Storage) -> int:
    return 1 if storage.kind == "untyped" else DTYPES[storage.kind].itemsize


# From values to tensors


def _collect(path: Path, value: Any, place: Place, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors by their names in nested tables, joined by dots, and what stands beside them."""
    tensors: dict[str, TensorInfo] = {}
    reader = _Tables()
    taken, metadata = reader.unwrap(value)
    for name, item in reader.walk(taken):
        if not isinstance(item, Rebuilt):
            metadata[name] = _as_text(item)
        elif name in tensors:
            raise FormatError(f"it has two tensors {shown(name)}")
        else:
            check_name(path, name)
            tensors[name] = _info(path, name, item, place, size)
    if not tensors:
        raise FormatError("it is a torch file without tensors")
    return tensors, metadata


class _Tables:
    """Nested tables of a pickle. They may contain one another, so that every look at a value is counted."""

    def __init__(self) -> None:
        self.visits = MAX_VISITS

    def spend(self, visits: int) -> None:
        self.visits -= visits
        if self.visits < 0:
            raise FormatError("it has more values than any checkpoint, or tables nested without end")

    def unwrap(self, value: Any) -> tuple[Any, dict[str, str]]:
        """The table of tensors inside what real files put around it, and the small values beside it."""
        metadata: dict[str, str] = {}
        wrappers: list[str] = []
        left_out: list[str] = []
        for _ in range(MAX_WRAPPERS):
            table = self.table(value) or {}
            wrapper = next((name for name in WRAPPERS if self.has_tensors(table.get(name))), None)
            if wrapper is None:
                break
            wrappers.append(wrapper)
            value = table[wrapper]
            for key, other in table.items():
                if self.is_small(other):
                    metadata[_name(key)] = _as_text(other)
                elif key != wrapper:
                    left_out.append(_name(key))
        if wrappers:
            metadata["wrapper"] = ".".join(wrappers)
        if left_out:
            metadata["left_out"] = ", ".join(left_out)
        return value, metadata

    def walk(self, value: Any) -> Iterator[tuple[str, Any]]:
        """The tensors and small values, in order, by their path."""
        left = [("", value, 0)]
        while left:
            name, item, depth = left.pop()
            if isinstance(item, Rebuilt) or self.is_small(item):
                yield name or "tensor", item
                continue
            table = self.table(item) or {}
            if depth == MAX_DEPTH:
                raise FormatError("its tables are nested without end")
            prefix = f"{name}." if name else ""
            left += [(prefix + _name(key), inner, depth + 1) for key, inner in reversed(list(table.items()))]

    def table(self, value: Any) -> Mapping[Any, Any] | None:
        """A value as a table: of a module, its parameters, buffers and modules, as its `state_dict` names them."""
        found: Mapping[Any, Any] | None = None
        if isinstance(value, dict):
            found = value
        elif isinstance(value, (list, tuple)):
            found = dict(enumerate(value))
        elif isinstance(value, Unknown) and isinstance(value.state, dict) and "_parameters" in value.state:
            parts = (value.state.get(key) for key in ("_parameters", "_buffers", "_modules"))
            found = {key: item for part in parts if isinstance(part, dict) for key, item in part.items()}
        elif isinstance(value, Unknown):
            found = value.table
        self.spend(len(found or ()))
        return found

    def has_tensors(self, value: Any) -> bool:
        """Whether a value is a table with a tensor somewhere in it."""
        return not isinstance(value, Rebuilt) and any(isinstance(item, Rebuilt) for _, item in self.walk(value))

    def is_small(self, value: Any) -> bool:
        """Whether a value is kept as text: a number, a text, or a list of them."""
        self.spend(SMALL)
        if isinstance(value, (list, tuple)) and value:
            self.spend(len(value))
            return all(isinstance(item, (int, float, str)) and not _is_long(item) for item in value)
        return value is None or isinstance(value, (str, bytes, int, float, complex))


def _is_long(value: Any) -> bool:
    return isinstance(value, str) and len(value) > MAX_LISTED


def _as_text(value: Any) -> str:
    if isinstance(value, (str, complex)):
        return str(value)
    if isinstance(value, (list, tuple)) and len(value) > MAX_LISTED:
        return f"{len(value)} values"
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else json.dumps(value)


def _name(key: Any) -> str:
    if isinstance(key, bytes):
        return key.decode("utf-8", "replace")
    return key if isinstance(key, str) else brief(key)


def _info(path: Path, name: str, tensor: Rebuilt, place: Place, size: int) -> TensorInfo:
    """A tensor checked against its storage, and the storage against the file."""
    dtype = DTYPES.get(tensor.kind)
    if dtype is None:
        raise FormatError(f"tensor {shown(name)} has the type {shown(tensor.kind)}, which is not read")
    start, end = place(tensor.storage)
    itemsize = _itemsize(tensor.storage)
    start += tensor.storage.offset * itemsize
    last = start + tensor.storage.count * itemsize
    info = TensorInfo(dtype, tensor.shape, start, last, tensor.stride, tensor.offset, tensor.conjugated, tensor.negated)
    check_size(path, name, info)
    if last > end:
        raise FormatError(f"tensor {shown(name)} needs {last - start:,} bytes, its storage has {max(end - start, 0):,}")
    reach = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True)) + 1
    if info.count and reach * dtype.itemsize > last - start:
        raise FormatError(f"tensor {shown(name)} of shape {shown_shape(info.shape)} reaches beyond its storage")
    if info.count * dtype.itemsize > max(MAX_EXPANDED, size):
        raise FormatError(f"tensor {shown(name)} of shape {shown_shape(info.shape)} is larger than the file")
    return info
