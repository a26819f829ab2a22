"""Writing: under a temporary name in the same folder, then renamed, so that nothing is ever half-written."""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from reverie.checkpoint.source import DTYPES
from reverie.checkpoint.weightfile import shown
from reverie.errors import OutputError

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # of the data in the file, as the reference implementation pads its header

Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: what the header says of it, and how to get its numbers when their turn has come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path`, then rename it; on failure nothing is left behind.

    Raises:
        OutputError: the folder is not there, may not be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Pretty JSON with a final newline."""
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of tensors that are at hand."""
    write_entries(path, [_at_hand(name, t) for name, t in tensors.items()], metadata)


def write_entries(
    path: Path,
    entries: Iterable[Entry],
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """A safetensors file, tensor by tensor: memory is needed for one of them at a time.

    Args:
        entries: in any order; the larger numbers are written first, so that all are aligned.
        metadata: texts for the header, beside `format`.
        progress: called after each tensor.

    Raises:
        OutputError: cannot be written there, two tensors of one name, or a type that safetensors does not have.
    """
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header = _header(path, ordered, metadata or {})

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(header)
            _write_data(file, ordered, progress)

    write_atomically(path, write)


def _at_hand(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _header(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for entry in entries:
        if entry.name in table:
            raise OutputError(f"cannot write {path}: two tensors would be named {shown(entry.name)}")
        if entry.dtype not in NAMES:
            raise OutputError(f"cannot write {path}: safetensors has no type for {shown(entry.name)} of {entry.dtype}")
        offsets = [position, position + entry.nbytes]
        table[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        position += entry.nbytes
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_data(file: BinaryIO, entries: list[Entry], progress: Progress | None) -> None:
    done, total = 0, sum(entry.nbytes for entry in entries)
    for entry in entries:
        tensor = entry.load().detach().to("cpu", entry.dtype).resolve_conj().resolve_neg().contiguous()
        if tuple(tensor.shape) != entry.shape:
            raise ValueError(f"tensor {entry.name} has shape {list(tensor.shape)}, announced was {list(entry.shape)}")
        if tensor.numel():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        done += entry.nbytes
        if progress:
            progress(done, total)
