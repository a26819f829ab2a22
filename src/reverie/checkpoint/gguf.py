"""GGUF files, versions 2 and 3: metadata, tensors in blocks, read from the mapped file.

Layout: ggml `docs/gguf.md`. Magic, version and two counts; the metadata; the tensor infos (name, dimensions with the
fastest first, type, offset); padding; the data, every tensor at a multiple of the alignment.
"""

import json
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from reverie.checkpoint.quantised import BLOCKS
from reverie.checkpoint.weightfile import TensorInfo, WeightFile, check_name, check_size, shown, shown_shape
from reverie.errors import CheckpointError

VERSIONS = (2, 3)
ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT
MAX_ALIGNMENT = 1 << 20
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_ENTRIES = 100_000  # of metadata, and of tensors
MAX_TEXTS = 1_000_000  # in lists; the largest vocabularies have some 400,000 words and pairs
MAX_TEXT = 1 << 25  # bytes
MAX_LISTED = 64  # values of a list that are kept
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # city96/ComfyUI-GGUF: tensors whose rows do not divide into blocks

TEXT, LIST = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STORED = {
    0: torch.float32, 1: torch.float16, 24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64,
    28: torch.float64, 30: torch.bfloat16,
}  # fmt: skip
PACKED = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    20: "IQ4_NL", 23: "IQ4_XS",
}  # fmt: skip
UNREAD = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


class Described(NamedTuple):
    """A tensor as the header has it, its shape in the order of torch."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def open_gguf(path: Path, data: mmap.mmap) -> WeightFile:
    """A GGUF file.

    Raises:
        CheckpointError: broken, cut short, of another version, or with a type that is not read.
    """
    header = _Header(path, data)
    tensor_count, entry_count = header.begin()
    metadata = header.metadata(entry_count)
    described = [header.tensor() for _ in range(tensor_count)]
    alignment = _alignment(path, metadata)
    begin = _aligned(header.position, alignment)
    tensors: dict[str, TensorInfo] = {}
    for tensor in described:
        if tensor.name in tensors:
            raise CheckpointError(f"{path}: tensor {shown(tensor.name)} occurs twice")
        tensors[tensor.name] = _info(path, tensor, metadata)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    _check_layout(path, tensors, alignment, len(data) - begin)
    return WeightFile(path, tensors, metadata, begin, data, "gguf")


class _Header:
    """A position in the header."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0
        self.texts = MAX_TEXTS

    def broken(self, why: str) -> CheckpointError:
        return CheckpointError(f"the GGUF header of {self.path} is broken at byte {self.position:,}: {why}")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise CheckpointError(f"{self.path} is cut short inside its GGUF header; download it again")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def begin(self) -> tuple[int, int]:
        """Counts of tensors and metadata."""
        self.take(4)
        version = self.number("I")
        if version & 0xFFFF == 0:
            raise CheckpointError(f"{self.path} is a big-endian GGUF file, which is not read; download the other one")
        if version not in VERSIONS:
            raise CheckpointError(f"{self.path} is a GGUF file of version {version}; 2 and 3 are read")
        tensors, entries = self.number("Q"), self.number("Q")
        if max(tensors, entries) > MAX_ENTRIES:
            raise self.broken(f"it claims {tensors:,} tensors and {entries:,} entries of metadata"[:120])
        return tensors, entries

    def metadata(self, count: int) -> dict[str, str]:
        """Everything by its key, as text."""
        values: dict[str, str] = {}
        for _ in range(count):
            key = self.text()
            if key in values:
                raise self.broken(f"the key {shown(key)} occurs twice")
            value = self.value(self.number("I"))
            values[key] = value if isinstance(value, str) else json.dumps(value)
        return values

    def text(self, errors: str = "strict") -> str:
        length = self.number("Q")
        if length > MAX_TEXT:
            raise self.broken(f"a text of {length:,} bytes")
        try:
            return self.take(length).decode("utf-8", errors)
        except UnicodeDecodeError:
            raise self.broken("a name that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text("replace")
        if kind == LIST:
            return self.list(self.number("I"), self.number("Q"))
        if kind not in SCALARS:
            raise self.broken(f"the unknown type {kind}")
        return self.number(SCALARS[kind])

    def list(self, kind: int, count: int) -> Any:
        """A short list, or how many values a long one has."""
        if kind != TEXT and kind not in SCALARS:
            raise self.broken(f"a list of the type {kind}")
        if count <= MAX_LISTED:
            return [self.value(kind) for _ in range(count)]
        if kind != TEXT:
            self.skip(count * struct.calcsize(f"<{SCALARS[kind]}"))
            return f"{count} values"
        self.texts -= count
        if self.texts < 0:
            raise self.broken(f"a list of {count:,} texts")
        for _ in range(count):
            self.skip(self.number("Q"))
        return f"{count} texts"

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.position:
            raise CheckpointError(f"{self.path} is cut short inside its GGUF header; download it again")
        self.position += count

    def tensor(self) -> Described:
        name = self.text()
        check_name(self.path, name)
        dimensions = self.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise self.broken(
                f"tensor {shown(name)} has {dimensions} dimensions; at most {MAX_DIMENSIONS} are possible"
            )
        shape = tuple(reversed([self.number("Q") for _ in range(dimensions)]))
        return Described(name, shape, self.number("I"), self.number("Q"))


def _alignment(path: Path, metadata: Mapping[str, str]) -> int:
    text = metadata.get("general.alignment", str(ALIGNMENT))
    alignment = int(text) if text.isdecimal() and len(text) < 10 else 0
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: the alignment {shown(text)} is no power of two")
    return alignment


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _info(path: Path, tensor: Described, metadata: Mapping[str, str]) -> TensorInfo:
    where = f"{path}: tensor {shown(tensor.name)}"
    packing = PACKED.get(tensor.type)
    if packing is None and tensor.type not in STORED:
        kind = UNREAD.get(tensor.type, str(tensor.type))
        raise CheckpointError(f"{where} has the GGML type {kind}, which is not read; {', '.join(BLOCKS)} are")
    dtype = torch.float32 if packing else STORED[tensor.type]
    check_size(path, tensor.name, TensorInfo(dtype, tensor.shape, 0, 0))
    count = math.prod(tensor.shape)
    elements, size = BLOCKS[packing][:2] if packing else (1, dtype.itemsize)
    if count % elements or (packing and (tensor.shape or (1,))[-1] % elements):
        found = shown_shape(tensor.shape)
        raise CheckpointError(f"{where} of shape {found} does not divide into {packing} blocks of {elements}")
    shape = _original(where, metadata.get(ORIGINAL_SHAPE + tensor.name), tensor.shape)
    return TensorInfo(dtype, shape, tensor.offset, tensor.offset + count // elements * size, packing=packing)


def _original(where: str, text: str | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape before a converter reshaped the tensor to make its rows divide into blocks."""
    if text is None:
        return shape
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise CheckpointError(f"{where} has an original shape that is none: {shown(text)}")
    if math.prod(value) != math.prod(shape):
        raise CheckpointError(f"{where} of shape {shown_shape(shape)} cannot have been {shown_shape(tuple(value))}")
    return tuple(value)


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], alignment: int, size: int) -> None:
    """The tensors must follow one another with nothing but padding between them and after them."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != _aligned(position, alignment):
            expected = _aligned(position, alignment)
            raise CheckpointError(f"{path}: tensor {shown(name)} begins at byte {info.start:,}, expected {expected:,}")
        position = info.end
    if position > size:
        raise CheckpointError(
            f"{path} is cut short: its header promises {position:,} bytes of data but {max(size, 0):,} are there; "
            "download it again"
        )
    if _aligned(position, alignment) < size:
        raise CheckpointError(f"{path} has {size - position:,} bytes after its last tensor; it is damaged")
