"""`reverie generate`."""

import time
from pathlib import Path
from typing import Any

from reverie.apps import console
from reverie.apps.progress import steps_progress
from reverie.engine.bundle import Model, load
from reverie.engine.generate import batches, resolve
from reverie.engine.image import BUNDLED_SOURCE, fingerprint, picture_format, read_request, save_image
from reverie.engine.request import Request
from reverie.errors import OutputError, RequestError


def run_generate(
    given: dict[str, Any],
    out: Path | None,
    source: Path | None,
    model: str | None,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """Draw and save.

    Args:
        given: fields of the request from the command line.
        out: a file, or a folder where several pictures go; the present folder if None.
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
    request = resolve(loaded, request)
    lines = _draw_and_save(loaded, request, paths)
    seconds = time.perf_counter() - started
    if as_json:
        console.print_json(
            {"files": [str(p) for p in paths], "seconds": round(seconds, 3), "model": fingerprint(loaded),
             "request": request.model_dump(exclude_none=True)}
        )  # fmt: skip
        return
    for line in lines:
        console.out.print(line, markup=False)
    console.note(f"{seconds:.1f} s, {request.sampler}, {request.steps} steps")


def _draw_and_save(model: Model, request: Request, paths: list[Path]) -> list[str]:
    """Save every picture as soon as it is drawn, so that stopping loses none. A line about each."""
    lines: list[str] = []
    try:
        with steps_progress("drawing") as progress:
            for result in batches(model, request, progress=progress):
                for i, image in enumerate(result.images):
                    path = paths[len(lines)]
                    save_image(image, path)
                    lines.append(f"{path}  {image.width}x{image.height}, seed {(result.request.seed or 0) + i}")
    except KeyboardInterrupt:
        if lines:
            console.note(f"{len(lines)} of {len(paths)} pictures were finished and saved")
        raise
    return lines


def targets(out: Path | None, count: int) -> list[Path]:
    """Where each picture goes; checked before any work is done. A folder (or None, the present one) gets new numbers.

    Raises:
        OutputError: a place that cannot be written.
        RequestError: an ending that no picture format has.
    """
    if out is None:
        folder, names = Path(), [f"reverie-{i:05d}.png" for i in _free_numbers(Path(), "reverie-", count)]
    elif out.is_dir() or out.suffix == "":
        folder, names = out, [f"{i:05d}.png" for i in _free_numbers(out, "", count)]
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


def _free_numbers(folder: Path, prefix: str, count: int) -> range:
    """The numbers after the highest that is there, so that nothing is overwritten."""
    stems = [p.stem.removeprefix(prefix) for p in folder.glob(f"{prefix}[0-9]*.png")]
    taken = [int(stem) for stem in stems if stem.isdecimal()]
    first = max(taken, default=0) + 1
    return range(first, first + count)


def _same_model(made_by: dict[str, str]) -> str | None:
    """The model that a picture names; None for the bundled one, wherever it is installed."""
    source = made_by.get("source", BUNDLED_SOURCE)
    return None if source == BUNDLED_SOURCE else source
