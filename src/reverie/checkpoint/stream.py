"""From weight files to safetensors files, tensor by tensor: other types, other names, one file or many.

Peak memory is about one tensor, whatever the size of the files: sources are mapped, and every tensor is converted when
its turn to be written has come.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from reverie.checkpoint.save import Entry, Progress, write_entries, write_json
from reverie.checkpoint.source import TensorInfo, WeightFile
from reverie.errors import OutputError

Types = torch.dtype | Callable[[str, TensorInfo], torch.dtype] | None
SHARD = 5_000_000_000  # bytes; the hub's customary size of one file


def entries_of(
    files: Iterable[WeightFile], *, dtype: Types = None, rename: Callable[[str], str | None] | None = None
) -> list[Entry]:
    """Every tensor of some files, to be written.

    Args:
        dtype: what floating-point tensors become, or a function that says so of each; None keeps their type (of packed
            ones, float32). Integers and booleans stay what they are.
        rename: gives each tensor's new name, or None for a tensor to be left out.
    """
    return [
        _entry(file, name, new_name, _target(dtype, name, info))
        for file in files
        for name, info in file.tensors.items()
        if (new_name := rename(name) if rename else name) is not None
    ]


def write_sharded(
    folder: Path,
    stem: str,
    entries: Sequence[Entry],
    *,
    limit: int = SHARD,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """`<stem>.safetensors`, or as many files as `limit` bytes a file make necessary, and their index.

    Shards and index are named as on the hub: `<stem>-00001-of-00003.safetensors`, `<stem>.safetensors.index.json`. On
    failure those already written are removed.

    Returns:
        the one file, or the index.

    Raises:
        OutputError: cannot be written there, or weights are there already that would be taken for these.
    """
    shards = _shards(entries, limit)
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    other = index if len(shards) == 1 else single
    if other.exists():
        raise OutputError(f"{folder} already holds {other.name}; remove it or choose another folder")
    if len(shards) == 1:
        write_entries(single, shards[0], metadata, progress)
        return single
    paths = [folder / f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    done, total = 0, sum(entry.nbytes for entry in entries)
    try:
        for path, shard in zip(paths, shards, strict=True):
            write_entries(path, shard, metadata, _shifted(progress, done, total))
            done += sum(entry.nbytes for entry in shard)
        names = {entry.name: path.name for path, shard in zip(paths, shards, strict=True) for entry in shard}
        if len(names) < len(entries):
            raise OutputError(f"cannot write {index}: two tensors would have one name")
        write_json(index, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})
    except BaseException:
        for path in paths:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    return index


def _target(dtype: Types, name: str, info: TensorInfo) -> torch.dtype:
    if dtype is None or not info.dtype.is_floating_point:
        return info.dtype
    return dtype if isinstance(dtype, torch.dtype) else dtype(name, info)


def _entry(file: WeightFile, name: str, new_name: str, dtype: torch.dtype) -> Entry:
    return Entry(new_name, dtype, file.tensors[name].shape, lambda: file.tensor(name, dtype))


def _shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """In order, each as full as it gets; a tensor larger than the limit has a file of its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of one file as progress of all."""
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)
