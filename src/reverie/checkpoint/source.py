"""Weight files of every layout, told apart by their content and opened as tables of mapped tensors.

A safetensors file is 8 bytes of header length, a JSON header, and the data. The header is read and checked in full
before anything else; tensors are views of the mapped file, so that opening costs no copy and no memory. Torch files and
GGUF files have modules of their own, which give the same kind of table.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reverie.checkpoint.fp8 import unscaled
from reverie.checkpoint.gguf import open_gguf
from reverie.checkpoint.torch_file import open_archive, open_stream
from reverie.checkpoint.weightfile import (
    MAX_DIMENSIONS,
    TensorInfo,
    WeightFile,
    check_name,
    check_size,
    map_file,
    shown,
    shown_shape,
)
from reverie.collector import paused_collector
from reverie.errors import CheckpointError

__all__ = ["DTYPES", "TensorInfo", "WeightFile", "open_sharded", "open_weights"]

MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
MAX_PARSED = 1 << 25  # bytes of a header that are read; those with the largest training logs have a few million
MAX_COST = 160_000_000  # bytes that a header may take in memory, by `_check_cost`
MAX_INDEX = 1 << 25  # bytes of an index of shards
MAX_SHARDS = 10_000

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
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"RIFF", "a WebP picture or a recording"),
    (b"<", "a web page or XML; the download failed: fetch it again, signed in where the site asks for it"),
    (b"version https://git-lfs", "a Git LFS pointer: the weights themselves were not downloaded; run `git lfs pull`"),
    (b"{", "JSON text, perhaps an error that a server sent instead of the file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras weights)"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
)
MAGIC_AT: tuple[tuple[int, bytes, str], ...] = (
    (4, b"TFL3", "a TensorFlow Lite model"),
    (257, b"ustar", "a tar archive (a PyTorch file of before 2017?); unpack it, or load it in torch and save it again"),
)
ONNX = re.compile(rb"\x08[\x01-\x20](\x12|\x1a|:|B)")  # a protobuf that begins with the field `ir_version`
ZIP = (b"PK\3\4", b"PK\5\6")
# Protocols 2 to 5; 1, with torch's magic number in decimal; 0, as hand-made pickles begin.
PICKLE = re.compile(rb"\x80[\x00-\x05]|L119547037146038801333356L\n|[(\]}]*c[\w.]+\n[\w.]+\n")


@paused_collector()
def open_weights(path: Path) -> WeightFile:
    """Map a weight file: safetensors, torch (zip or older) or GGUF, whatever its name says.

    Weights that are stored as 8-bit floats with a scale come as one tensor (`reverie.checkpoint.fp8`).

    Raises:
        CheckpointError: not there, none of these, cut short, hostile, or with a header that does not describe its data.
    """
    size = _size(path)
    with path.open("rb") as file:
        start = file.read(512)
    if 2 <= int.from_bytes(start[:8], "little") <= MAX_HEADER and start[8:9] == b"{":
        return unscaled(_open_safetensors(path, size))
    if start.startswith(ZIP):
        return unscaled(open_archive(path, map_file(path)))
    if start.startswith(b"GGUF"):
        return open_gguf(path, map_file(path))
    if PICKLE.match(start):
        return unscaled(open_stream(path, map_file(path)))
    raise CheckpointError(
        f"{path} is not a safetensors file, nor one of PyTorch or GGUF: it looks like {_looks_like(start)}"
    )


def _open_safetensors(path: Path, size: int) -> WeightFile:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise CheckpointError(
                f"{path} is cut short inside its header ({size:,} of at least {8 + length:,} bytes); download it again"
            )
        if length > MAX_PARSED:
            raise CheckpointError(f"{path} has a header of {length:,} bytes; at most {MAX_PARSED:,} are read")
        tensors, metadata = _parse_header(path, file.read(length))
    _check_layout(path, tensors, size - 8 - length)
    return WeightFile(path, tensors, metadata, 8 + length, map_file(path))


def open_sharded(index: Path) -> list[WeightFile]:
    """Map every file that a `*.safetensors.index.json` names.

    Shards are files of the index's folder. A shard may be a link only to a file of that folder or, in a cache of the
    Hugging Face hub (`models--org--name/snapshots/<commit>/...` beside `blobs`), of its `models--org--name`.

    Raises:
        CheckpointError: broken index, a shard outside the folder or missing, or a tensor that is not where it says.
    """
    names = _read_index(index)
    shards = {shard: open_weights(_inside(index, shard)) for shard in sorted(set(names.values()))}
    for tensor, shard in names.items():
        if tensor not in shards[shard].tensors:
            raise CheckpointError(f"{index} says that {shown(tensor)} is in {shard}, which does not have it")
    for tensor, times in Counter(name for file in shards.values() for name in file.tensors).items():
        if times > 1:
            raise CheckpointError(f"tensor {shown(tensor)} is in {times} of the files that {index} names")
    return list(shards.values())


def _read_index(index: Path) -> dict[str, str]:
    try:
        if index.exists() and (not index.is_file() or index.stat().st_size > MAX_INDEX):
            raise ValueError(f"no file of at most {MAX_INDEX:,} bytes")
        raw = index.read_bytes()
        _check_cost(raw)
        weight_map = json.loads(raw.decode("utf-8"))["weight_map"]
        names = {str(k): str(v) for k, v in weight_map.items()}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {str(error)[:120]}") from None
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is not an index of shards: no table `weight_map` in it") from None
    if len(set(names.values())) > MAX_SHARDS:
        raise CheckpointError(f"{index} names more than {MAX_SHARDS:,} files")
    return names


def _inside(index: Path, shard: str) -> Path:
    if Path(shard).name != shard or not shard.isprintable():
        raise CheckpointError(f"{index} names {shown(shard)}; shards must be files of the same folder")
    path = index.parent / shard
    try:
        folder, target, linked = index.parent.resolve(), path.resolve(), path.is_symlink()
    except (OSError, RuntimeError):  # a name that is too long, a link to itself
        raise CheckpointError(f"{index} names {shown(shard)}, which cannot be opened") from None
    hub = [parent.parent for parent in (folder, *folder.parents) if parent.name == "snapshots"]
    if linked and not any(target.is_relative_to(root) for root in (folder, *hub[:1])):
        raise CheckpointError(f"{path} is a link to a file outside its folder; link the whole folder or copy the file")
    return path


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
    for at, magic, name in MAGIC_AT:
        if start[at:].startswith(magic):
            return name
    if ONNX.match(start):
        return "an ONNX model"
    if start and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start[:64]):
        return f"text, beginning {start[:24].decode('ascii')!r}"
    return f"something else, beginning with bytes {start[:8].hex(' ')}"


def _parse_header(path: Path, raw: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        _check_cost(raw)
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {path} is broken: {str(error)[:120]}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"the header of {path} has metadata that is not a JSON object")
    tensors = {name: _parse_entry(path, name, entry) for name, entry in header.items()}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return tensors, {str(k): str(v) for k, v in metadata.items()}


def _check_cost(raw: bytes) -> None:
    """Refuse JSON that takes far more memory than it is long: millions of empty lists and tables."""
    if 100 * raw.count(b"[") + 250 * raw.count(b"{") + 60 * raw.count(b",") > MAX_COST:
        raise ValueError("it has more lists and tables than any checkpoint")


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shown(twice)} occurs twice")
    return table


def _parse_entry(path: Path, name: str, entry: object) -> TensorInfo:
    check_name(path, name)
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if (
            len(shape) <= MAX_DIMENSIONS
            and all(type(n) is int and n >= 0 for n in (*shape, start, end))
            and start <= end
        ):
            pass
        case _:
            raise CheckpointError(f"the header of {path} does not describe tensor {shown(name)} properly")
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {shown(name)} has the unknown type {shown(dtype)}")
    info = TensorInfo(DTYPES[dtype], tuple(shape), start, end)
    check_size(path, name, info)
    if info.count * info.dtype.itemsize != end - start:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} has shape {shown_shape(info.shape)} of {dtype} "
            f"but {end - start:,} bytes of data"
        )
    return info


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], size: int) -> None:
    """The tensors must tile the data exactly: no gap, no overlap, nothing after the end."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            raise CheckpointError(f"{path}: tensor {shown(name)} begins at byte {info.start:,}, expected {position:,}")
        position = info.end
    if position > size:
        raise CheckpointError(
            f"{path} is cut short: its header promises {position:,} bytes of data but {size:,} are there; "
            "download it again"
        )
    if position < size:
        raise CheckpointError(f"{path} has {size - position:,} bytes after its last tensor; it is damaged")
