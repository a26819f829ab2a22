"""Weight files as tables of mapped tensors.

A safetensors file is 8 bytes of header length, a JSON header, and the data. The header is read and checked in full
before anything else; tensors are views of the mapped file, so that opening costs no copy and no memory.
"""

import json
import math
import mmap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reverie.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
MAX_DIMENSIONS = 64  # what numpy and most of torch can do
MAX_BYTES = 2**63 - 1  # of a tensor, zero-sized dimensions counted as one: what torch can address

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip

# First bytes of files that people take for a checkpoint, and what to say about them.
MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive (a PyTorch .ckpt/.pt file?)"),
    (b"\x80\x02", "a Python pickle (an old .ckpt/.pt file?)"),
    (b"\x80\x04", "a Python pickle"),
    (b"GGUF", "a GGUF file"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"<", "a web page or XML (a failed download?)"),
    (b"version https://git-lfs", "a Git LFS pointer (the weights themselves were not downloaded)"),
)


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightFile:
    """A checked safetensors file. `tensors` are in the order of the header; `data` is where their offsets begin."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data: int
    _map: mmap.mmap = field(repr=False)

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file. Writing to it changes this process's copy of the page, never the file."""
        info = self.tensors[name]
        if info.count == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        start = self.data + info.start
        if start % info.dtype.itemsize:  # legal but rare: numbers that do not begin where the processor wants
            raw = torch.frombuffer(bytearray(self._map[start : self.data + info.end]), dtype=info.dtype)
        else:
            raw = torch.frombuffer(self._map, dtype=info.dtype, count=info.count, offset=start)
        return raw.view(info.shape)


def open_weights(path: Path) -> WeightFile:
    """Map a safetensors file.

    Raises:
        CheckpointError: not there, not safetensors, cut short, or with a header that does not describe its data.
    """
    size = _size(path)
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        looks = _looks_like(start)
        if size < 8 or not 2 <= length <= MAX_HEADER or start[8:9] != b"{":
            raise CheckpointError(f"{path} is not a safetensors file: it looks like {looks}")
        if 8 + length > size:
            raise CheckpointError(
                f"{path} is cut short inside its header ({size:,} of at least {8 + length:,} bytes); download it again"
            )
        file.seek(8)
        tensors, metadata = _parse_header(path, file.read(length))
        _check_layout(path, tensors, size - 8 - length)
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:  # a file larger than memory and swap, where the system does not overcommit
            raise CheckpointError(f"cannot map {path} ({size:,} bytes): {error.strerror}") from None
    return WeightFile(path, tensors, metadata, 8 + length, mapped)


def open_sharded(index: Path) -> list[WeightFile]:
    """Map every file that a `*.safetensors.index.json` names.

    Raises:
        CheckpointError: broken index, a shard outside the folder or missing, or a tensor that is not where it says.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names: dict[str, str] = {str(k): str(v) for k, v in weight_map.items()}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is not an index of shards: no table `weight_map` in it") from None
    shards = {}
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard or not shard.isprintable():
            raise CheckpointError(f"{index} names {shard!r}; shards must be files of the same folder")
        shards[shard] = open_weights(index.parent / shard)
    for tensor, shard in names.items():
        if tensor not in shards[shard].tensors:
            raise CheckpointError(f"{index} says that {tensor!r} is in {shard}, which does not have it")
    for tensor, times in Counter(name for file in shards.values() for name in file.tensors).items():
        if times > 1:
            raise CheckpointError(f"tensor {tensor!r} is in {times} of the files that {index} names")
    return list(shards.values())


def _size(path: Path) -> int:
    try:
        if not path.exists():
            raise CheckpointError(f"no such file: {path}")
        if not path.is_file():  # a pipe or device would hang when opened
            raise CheckpointError(f"{path} is not a file")
        size = path.stat().st_size
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes); download it again")
    return size


def _looks_like(start: bytes) -> str:
    for magic, name in MAGIC:
        if start.startswith(magic):
            return name
    if start and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return f"text, beginning {start[:24].decode('ascii')!r}"
    return f"something else, beginning with bytes {start[:8].hex(' ')}"


def _parse_header(path: Path, raw: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {path} is broken: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"the header of {path} has metadata that is not a JSON object")
    tensors = {name: _parse_entry(path, name, entry) for name, entry in header.items()}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return tensors, {str(k): str(v) for k, v in metadata.items()}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} occurs twice")
    return table


def _parse_entry(path: Path, name: str, entry: object) -> TensorInfo:
    if not name.isprintable():  # it goes into messages
        raise CheckpointError(f"the header of {path} has a tensor name with control characters: {name!r}")
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if (
            len(shape) <= MAX_DIMENSIONS
            and all(type(n) is int and n >= 0 for n in (*shape, start, end))
            and start <= end
        ):
            pass
        case _:
            raise CheckpointError(f"the header of {path} does not describe tensor {name!r} properly")
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has the unknown type {dtype!r}")
    info = TensorInfo(DTYPES[dtype], tuple(shape), start, end)
    if math.prod(max(n, 1) for n in shape) * info.dtype.itemsize > MAX_BYTES:
        raise CheckpointError(f"{path}: tensor {name!r} has an impossible shape {shape}")
    if info.count * info.dtype.itemsize != end - start:
        raise CheckpointError(
            f"{path}: tensor {name!r} has shape {list(shape)} of {dtype} but {end - start:,} bytes of data"
        )
    return info


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], size: int) -> None:
    """The tensors must tile the data exactly: no gap, no overlap, nothing after the end."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            raise CheckpointError(f"{path}: tensor {name!r} begins at byte {info.start:,}, expected {position:,}")
        position = info.end
    if position > size:
        raise CheckpointError(
            f"{path} is cut short: its header promises {position:,} bytes of data but {size:,} are there; "
            "download it again"
        )
    if position < size:
        raise CheckpointError(f"{path} has {size - position:,} bytes after its last tensor; it is damaged")
