"""Drawing what is to be judged: many prompts in batches, every picture kept as soon as it is there."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie.checkpoint.save import write_json
from reverie.engine.bundle import Model
from reverie.engine.drawing import Picture
from reverie.engine.generate import batches
from reverie.engine.image import fingerprint, save_image
from reverie.engine.request import Request
from reverie.engine.resolve import resolve
from reverie.errors import RequestError

RUN = "run.json"
Progress = Callable[[int, int], None]  # pictures done, pictures in all


def request_for(model: Model, batch: int, **fields: Any) -> Request:
    """What every picture has in common, every default made explicit.

    Args:
        batch: pictures that are drawn at once.
        fields: of `Request`, where the model's own defaults are not wanted.
    """
    plain = {"dialect": "plain", "upscaler": "none", "seed": 0, "batch_size": batch}
    return resolve(model, Request.of(**plain | {name: v for name, v in fields.items() if v is not None}))


def claim(out: Path, model: Model, request: Request, facts: Mapping[str, Any]) -> None:
    """Note in a folder whose pictures it holds.

    Raises:
        RequestError: it holds pictures of another model, or drawn in another way.
    """
    shown = request.model_dump(mode="json", exclude_none=True, exclude={"prompt", "seed", "batch_size"})
    wanted = {"model": fingerprint(model), "request": shown, **facts}
    path = out / RUN
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
        return
    found = _read(path)
    different = [name for name in wanted if found.get(name) != json.loads(json.dumps(wanted[name]))]
    if different:
        raise RequestError(f"{out} holds pictures of another run: its {different[0]} differs; choose another --out")


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise RequestError(f"{path} does not say what was drawn; move it away or choose another --out") from None
    return found


def place(folder: Path, number: int) -> Path:
    """Where picture `number` is."""
    return folder / f"{number:05d}.png"


def draw_missing(
    model: Model, request: Request, prompts: Sequence[str], folder: Path, progress: Progress | None = None
) -> int:
    """Draw what is not there yet; picture n has seed n. Returns how many were drawn.

    Args:
        request: what they have in common; see `request_for`.
        progress: called after every batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [n for n in range(len(prompts)) if not place(folder, n).exists()]
    for start in range(0, len(missing), request.batch_size):
        numbers = missing[start : start + request.batch_size]
        own = [request.model_copy(update={"prompt": prompts[n], "seed": n, "batch_size": 1}) for n in numbers]
        pictures = [Picture(row, each) for row, each in enumerate(own)]
        images = (image for result in batches(model, request, pictures=pictures) for image in result.images)
        for number, image in zip(numbers, images, strict=True):
            save_image(image, place(folder, number))
        if progress:
            progress(len(prompts) - len(missing) + start + len(numbers), len(prompts))
    return len(missing)
