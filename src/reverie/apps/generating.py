"""`reverie generate`."""

import time
from pathlib import Path
from typing import Any

from reverie.apps import console
from reverie.engine.bundle import load
from reverie.engine.image import fingerprint, picture_format, read_request, save_image
from reverie.engine.request import Request
from reverie.errors import OutputError, RequestError


def run_generate(
    given: dict[str, Any],
    out: Path,
    source: Path | None,
    model: str | None,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """Draw and save.

    Args:
        given: fields of the request from the command line.
        out: a file, or a folder where several pictures go.
        source: a picture whose request is the starting point.
        model: path of the model; else the one that drew `source`; else the bundled one.
        options: `device`, `precision`, `variant`, `prediction` of `reverie.load`.
    """
    started = time.perf_counter()
    fields, made_by = read_request(source) if source else ({}, {})
    request = Request.of(**{**fields, **given})
    if source is None and not request.prompt:
        raise RequestError('there is no prompt; say what to draw, for example: reverie generate "a red apple"')
    paths = targets(out, request.count)
    loaded = load(model or _same_model(made_by), **options)
    if made_by and model is None and fingerprint(loaded)["hash"] != made_by.get("hash"):
        raise RequestError(
            f"{source} was drawn by another {made_by.get('name')} (its hash differs); name one with --model"
        )
    with console.steps_progress("drawing") as progress:
        result = loaded.draw(request, progress=progress)
    for path, image in zip(paths, result.images, strict=True):
        save_image(image, path)
    seconds = time.perf_counter() - started
    if as_json:
        console.print_json(
            {"files": [str(p) for p in paths], "seconds": round(seconds, 3), "model": result.model,
             "request": result.request.model_dump(exclude_none=True)}
        )  # fmt: skip
        return
    for i, (path, image) in enumerate(zip(paths, result.images, strict=True)):
        console.out.print(f"{path}  {image.width}x{image.height}, seed {(result.request.seed or 0) + i}", markup=False)
    console.note(f"{seconds:.1f} s, {result.request.sampler}, {result.request.steps} steps")


def targets(out: Path, count: int) -> list[Path]:
    """Where each picture goes; checked before any work is done.

    Raises:
        OutputError: a place that cannot be written.
        RequestError: an ending that no picture format has.
    """
    if out.is_dir() or out.suffix == "":
        folder, names = out, [f"{i:05d}.png" for i in _free_numbers(out, count)]
    elif count == 1:
        folder, names = out.parent, [out.name]
    else:
        folder, names = out.parent, [f"{out.stem}-{i}{out.suffix}" for i in range(1, count + 1)]
    picture_format(Path(names[0]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{names[0]}.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from None
    paths = [folder / name for name in names]
    for path in paths:
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder")
    return paths


def _free_numbers(folder: Path, count: int) -> range:
    """The numbers after the highest that is there, so that nothing is overwritten."""
    taken = [int(p.stem) for p in folder.glob("[0-9]*.png") if p.stem.isdecimal()] if folder.is_dir() else []
    first = max(taken, default=0) + 1
    return range(first, first + count)


def _same_model(made_by: dict[str, str]) -> str | None:
    """The model that a picture names; None for the bundled one, wherever it is installed."""
    from reverie.engine.bundle import BUNDLED, bundled_path

    source = made_by.get("source")
    if not source or source == str(bundled_path()):
        return None
    return None if made_by.get("name") == BUNDLED and not Path(source).exists() else source
