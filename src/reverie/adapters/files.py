"""Adapter files by the names that prompts and pictures call them by, and the hashes that programs write of them."""

import difflib
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from reverie.checkpoint.source import open_weights
from reverie.checkpoint.weightfile import shown
from reverie.errors import CheckpointError, RequestError

WEIGHTS = (".safetensors", ".pt", ".ckpt", ".bin", ".sft")
PICTURES = (".png", ".webp", ".jxl", ".avif")  # textual inversions come in them
INSIDE = ("pytorch_lora_weights", "adapter_model")  # names that diffusers and peft give to the file in a folder
ALIAS = "ss_output_name"  # what sd-scripts' trainer called the file
DEEPEST = 8  # folders below the first
SHOWN = 5  # paths in a message


def find(name: str, folders: Sequence[Path], kind: str = "LoRA") -> Path:
    """The file that a name means: a path, or in `folders` a file's name, its stem, or the alias in its metadata.

    Upper and lower case, the ending and leading folders may differ from the file's, as long as one file fits: the
    exact name goes first, then any case, then the alias that A1111 prefers (`ss_output_name`).

    Args:
        name: as in `<lora:name:0.8>`, in `embedding:name` or on the command line.
        kind: for messages; an `embedding` may be a picture.

    Raises:
        RequestError: no such file, or several.
    """
    with suppress(OSError, ValueError, RuntimeError):  # too long, with a null, of an unknown user
        path = Path(name).expanduser()
        if name and path.exists():
            return weight_file(path)
    if path.is_absolute() or name.startswith(("./", "../", "~")):
        raise RequestError(f"no {kind} at {path}: no such file")
    files = list(_files(folders, WEIGHTS + PICTURES if kind == "embedding" else WEIGHTS))
    wanted = name.replace("\\", "/").strip("/")
    exact = [p for folder, p in files if wanted in _calls(folder, p)]
    loose = [p for folder, p in files if wanted.lower() in {call.lower() for call in _calls(folder, p)}]
    chosen = _distinct(exact or loose or [p for _, p in files if _alias(p).lower() == wanted.lower()])
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        paths = ", ".join(map(str, chosen[:SHOWN]))
        raise RequestError(
            f"{len(chosen)} files are called {shown(name)}: {paths}; give the path of one, or rename one"
        )
    stems = sorted({p.stem for _, p in files})
    near = difflib.get_close_matches(name, stems, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"{len(stems)} are there"
    places = " and ".join(map(str, folders[:SHOWN])) or "no folder"
    raise RequestError(f"no {kind} {shown(name)} in {places}; {hint}")


def weight_file(path: Path) -> Path:
    """The file itself, or the one in a folder of diffusers or peft.

    Raises:
        RequestError: a folder without one.
    """
    if not path.is_dir():
        return path
    inside = (path / f"{stem}{ending}" for stem in INSIDE for ending in WEIGHTS)
    found = next((file for file in inside if file.is_file()), None)
    if found is None:
        raise RequestError(f"{path} is a folder without {' or '.join(f'{stem}.safetensors' for stem in INSIDE)}")
    return found


def digest(path: Path, start: int = 0) -> str:
    """SHA-256 of a file from a byte on.

    Raises:
        CheckpointError: it cannot be read.
    """
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            file.seek(start)
            while block := file.read(1 << 20):
                found.update(block)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return found.hexdigest()


def _files(folders: Sequence[Path], endings: tuple[str, ...]) -> Iterator[tuple[Path, Path]]:
    """Every file with one of the endings, and the folder that it was found below."""
    for folder in dict.fromkeys(folders):
        for where, below, names in os.walk(folder):
            below[:] = sorted(name for name in below if not name.startswith("."))
            if len(Path(where).relative_to(folder).parts) >= DEEPEST:
                below.clear()
            for name in sorted(names):
                if name.lower().endswith(endings) and not name.startswith("."):
                    yield folder, Path(where) / name


def _calls(folder: Path, path: Path) -> set[str]:
    """What a file may be called: with its ending and without, with the folders above it and without."""
    relative = path.relative_to(folder)
    return {form.as_posix() for p in (relative, Path(path.name)) for form in (p, p.with_suffix(""))}


def _alias(path: Path) -> str:
    """The name that the trainer gave it; empty where there is none, or the file is broken."""
    with suppress(CheckpointError):
        if path.suffix.lower() in {".safetensors", ".sft"}:
            return open_weights(path).metadata.get(ALIAS, "")
    return ""


def _distinct(paths: Sequence[Path]) -> list[Path]:
    """Each file once, however many links lead to it."""
    return list({path.resolve(): path for path in reversed(paths)}.values())[::-1]
