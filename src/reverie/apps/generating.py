"""`reverie generate`: draw, show how it goes, save every picture as soon as it is drawn."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from reverie.apps import console
from reverie.apps.progress import steps_progress
from reverie.apps.reading import printable, redraw
from reverie.apps.terminal import Screen
from reverie.engine.animation import FORMATS, save_animation
from reverie.engine.budget import planned
from reverie.engine.bundle import Model, load
from reverie.engine.generate import Progress, Watch, batches, prepared
from reverie.engine.image import BUNDLED_SOURCE, fingerprint, picture_format, save_image
from reverie.engine.library import Library
from reverie.engine.measures import shown
from reverie.engine.preview import LinearPreview, TinyPreview
from reverie.engine.rates import Foretold, Seconds, foretell, settled
from reverie.engine.request import Request
from reverie.engine.resolve import resolve
from reverie.engine.usage import Usage
from reverie.errors import OutputError, RequestError

SHOWN = 384  # pixels of a preview's longer side
HASHED = ("lora: ", "embedding: ", "control: ", "image prompt: ")  # what of `Result.models` are SHA-256 of adapters


@dataclass(frozen=True)
class Previews:
    """Whether and where pictures are shown before they are finished.

    Attributes:
        every: evaluations between two; 0 for none.
        path: a file that is written anew each time; None for the terminal.
        decoder: a tiny decoder's file; without one colours come from a linear map.
    """

    every: int = 0
    path: Path | None = None
    decoder: Path | None = None


@dataclass(frozen=True)
class Session:
    """A loaded model and how its user wants to be told.

    Attributes:
        events: print one JSON object a line for programs.
        metadata: write into the pictures what made them.
        verbose: say what was planned and what was used.
        before: what drew the picture that is drawn again: hashes by names, as in `Result.models`.
        last: nothing is drawn with the model after the next request.
    """

    model: Model
    events: bool = False
    previews: Previews = field(default_factory=Previews)
    metadata: bool = True
    verbose: bool = False
    before: Mapping[str, str] = field(default_factory=dict)
    last: bool = False

    @contextmanager
    def watching(self, title: str, place: Mapping[str, Any]) -> Iterator[tuple[Progress, Watch | None]]:
        """What to call while drawing: a progress line and previews, or events that carry `place`."""
        watch = _previewing(self.model, self.previews) if self.previews.every else None
        with steps_progress(title) as show:

            def progress(done: int, total: int) -> None:
                show(done, total)
                if self.events:
                    console.print_event("step", done=done, total=total, **place)

            yield progress, watch


def run_generate(
    given: dict[str, Any], out: Path | None, source: Path | None, model: str | None, options: dict[str, Any],
    how: dict[str, Any],
) -> None:  # fmt: skip
    """Draw and save.

    Args:
        given: fields of the request from the command line.
        out: a file, or a folder where several pictures go; the present folder if None.
        source: a picture whose request is the starting point.
        model: path of the model; else the one that drew `source`; else the bundled one.
        options: `device`, `precision`, `variant`, `prediction` of `reverie.load`.
        how: `events`, `previews` and `metadata` of the session.
    """
    started = time.perf_counter()
    request, made_by = asked(given, source)
    frames = request.travel.frames if request.travel else request.count
    film = bool(request.travel) and out is not None and out.suffix.lower() in FORMATS
    paths = targets(out, 1 if film or request.only is not None else frames)
    loaded, request = commissioned(request, made_by, source, model, options, refiner="refine" in given)
    session = Session(loaded, before=made_by, last=True, **how)
    foretold = _foretold(loaded, request) if session.verbose else None
    with Usage(loaded.device) as usage:
        saved = save_film(session, request, paths[0]) if film else draw_and_save(session, request, paths, {})
    figures = {} if foretold is None else settled(foretold, usage.used)
    seconds = time.perf_counter() - started
    if session.events:
        console.print_event(
            "done", files=[str(path) for path in saved], seconds=round(seconds, 3), model=fingerprint(loaded),
            request=request.model_dump(mode="json", exclude_none=True), **figures,
        )  # fmt: skip
        return
    console.note(f"{seconds:.1f} s, {request.sampler}, {request.steps} steps")
    if foretold is not None:
        console.note(loaded.speed.describe())
        console.note(
            f"planned: {memory_words(foretold.plan.own, foretold.plan.mapped)}, {time_words(foretold.expected)}"
        )
        console.note(f"used: {memory_words(usage.used.own, usage.used.mapped)}, {usage.used.seconds:.1f} s")


def commissioned(
    request: Request, made_by: Mapping[str, str], source: Path | None, model: str | None, options: Mapping[str, Any],
    *, refiner: bool,
) -> tuple[Model, Request]:  # fmt: skip
    """The model, opened, and the request, resolved.

    Args:
        request, made_by: what `asked` gave.
        source, model, options: as for `run_generate`.
        refiner: whether the request names a refiner of its own.

    Raises:
        RequestError: another model than the one that drew `source`, a field that cannot be.
    """
    loaded = opened(model or _same_model(made_by), options)
    if made_by and model is None:
        _check_hash(loaded, made_by.get("hash", "-"), f"{source} was drawn by another {made_by.get('name')}", "--model")
    request = resolve(loaded, request)
    if request.refine is not None and not refiner and "refiner_hash" in made_by:
        name = request.refine.model
        what = f"{source} was finished by another {name}"
        _check_hash(loaded.successor(name), made_by["refiner_hash"], what, "--refine-model")
    return loaded, request


def memory_words(own: int | None, mapped: int | None) -> str:
    """`1.2 GiB of memory and 3.97 GiB of mapped files`."""
    if own is None:
        return "memory unknown"
    return f"{shown(own)} of memory" + (f" and {shown(mapped)} of mapped files" if mapped else "")


def time_words(seconds: Seconds) -> str:
    """`12.3 s (11.0 to 14.2)`, or a range where nothing was measured yet."""
    if seconds.likely is None:
        return f"{seconds.low:.1f} to {seconds.high:.1f} s (nothing was drawn with such a model here yet)"
    return f"{seconds.likely:.1f} s ({seconds.low:.1f} to {seconds.high:.1f})"


def _foretold(model: Model, request: Request) -> Foretold:
    with console.busy("planning"):
        return foretell(model, planned(model, request, prepared, model.memory, last=True))


def opened(model: str | None, options: Mapping[str, Any]) -> Model:
    """A model by path, or by the name or hash of one that is at hand; the bundled one if None."""
    return load(None if model is None else Library.of_environment().resolve(model), **options)


def asked(given: dict[str, Any], source: Path | None) -> tuple[Request, dict[str, str]]:
    """The request, and the model that drew `source` if it was Reverie's.

    Raises:
        RequestError: nothing to draw.
    """
    if source is None:
        request = Request.of(**given)
        if not request.prompt and request.image is None:
            raise RequestError('there is no prompt; say what to draw, for example: reverie generate "a red apple"')
        return request, {}
    request, found = redraw(source, given)
    for note in found.notes:
        console.note(printable(f"not carried: {note}"))
    return request, found.model if found.own else {}


def _check_hash(model: Model, wanted: str, what: str, flag: str) -> None:
    if not fingerprint(model)["hash"].startswith(wanted):
        raise RequestError(f"{what} (its hash differs); name one with {flag}")


def draw_and_save(session: Session, request: Request, paths: list[Path], place: Mapping[str, Any]) -> list[Path]:
    """Draw a resolved request and save every picture as soon as it is drawn, so that stopping loses none."""
    saved: list[Path] = []
    try:
        with session.watching("drawing", place) as (progress, watch):
            for result in batches(session.model, request, progress=progress, watch=watch, last=session.last):
                if not saved:
                    _tell_coverage(result.model)
                    _tell_changed(result.model, session.before)
                for image, own in zip(result.images, result.own, strict=True):
                    path = paths[len(saved)]
                    save_image(image, path, metadata=session.metadata)
                    saved.append(path)
                    _tell(session, image, path, own, place)
    except KeyboardInterrupt:
        if saved:
            console.note(f"{len(saved)} of {len(paths)} pictures were finished and saved")
        raise
    return saved


def _tell_coverage(model: Mapping[str, str]) -> None:
    """What of each LoRA has found its place."""
    start = "lora coverage: "
    for name, line in model.items():
        if name.startswith(start):
            console.note(printable(f"{name.removeprefix(start)}: {line}"))


def _tell_changed(model: Mapping[str, str], before: Mapping[str, str]) -> None:
    """Adapters whose files are no longer the ones that were."""
    for name, digest in model.items():
        if name.startswith(HASHED) and before.get(name, digest) != digest:
            console.note(printable(f"{name}: the file has changed since, so that the picture may be another"))


def save_film(session: Session, request: Request, path: Path) -> list[Path]:
    """Draw the frames of a journey into one animated picture."""
    with session.watching("drawing", {}) as (progress, watch):
        found = list(batches(session.model, request, progress=progress, watch=watch, last=session.last))
    frames = [image for result in found for image in result.images]
    save_animation(frames, path, metadata=session.metadata)
    _tell(session, frames[0], path, found[0].own[0], {"frames": len(frames)})
    return [path]


def _tell(session: Session, image: Image.Image, path: Path, own: Request, place: Mapping[str, Any]) -> None:
    if session.events:
        console.print_event("picture", file=str(path), seed=own.seed, width=image.width, height=image.height, **place)
    else:
        console.out.print(f"{path}  {image.width}x{image.height}, seed {own.seed}", markup=False)


def _previewing(model: Model, wanted: Previews) -> Watch:
    """Show the picture as it is so far, in the terminal or as a file."""
    screen, vae = Screen(), model.parts.vae
    preview: Callable[[Tensor], Tensor]
    if wanted.decoder:
        preview = TinyPreview(wanted.decoder, vae.config.latent_channels, model.device)
    else:
        preview = LinearPreview(model.ready("vae", vae), model.dtype)

    def watch(done: int, total: int, x0: Tensor) -> None:
        if done % wanted.every and done != total:
            return
        pixels = (preview(x0[:1])[0] * 255).round().byte().permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels)
        scale = max(SHOWN // max(image.size), 1)
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
        if wanted.path is None:
            screen.show(image)
        else:
            save_image(image, wanted.path)

    return watch


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
    if Path(names[0]).suffix.lower() not in FORMATS:
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


def _same_model(made_by: Mapping[str, str]) -> str | None:
    """The model that a picture names; None for the bundled one, wherever it is installed.

    Raises:
        RequestError: it names a model, but not where that is.
    """
    if made_by and "source" not in made_by:
        raise RequestError(f"the picture does not say where its model {made_by.get('name')} is; name it with --model")
    source = made_by.get("source", BUNDLED_SOURCE)
    return None if source == BUNDLED_SOURCE else source
