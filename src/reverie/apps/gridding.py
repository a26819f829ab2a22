"""`reverie grid`: one picture for every combination of values, on one labelled sheet."""

from pathlib import Path
from typing import Any

from PIL import Image

from reverie.apps import console
from reverie.apps.generating import Session, targets
from reverie.engine.generate import batches
from reverie.engine.grid import Axis, Cell, cells, sheet
from reverie.engine.image import save_image
from reverie.engine.resolve import resolve
from reverie.errors import RequestError


def run_grid(given: dict[str, Any], written: list[str], out: Path | None, keep: Path | None, session: Session) -> None:
    """Draw and save.

    Args:
        given: fields that all pictures share.
        written: one to three axes, as `Axis.parse` reads them.
        out: where the sheet goes.
        keep: a folder for the single pictures too.

    Raises:
        RequestError: no prompt, an axis that cannot be, a combination that the model refuses: all before any drawing.
    """
    axes = [Axis.parse(text) for text in written]
    if not given.get("prompt") and not given.get("image") and all(axis.field != "prompt" for axis in axes):
        raise RequestError("there is no prompt; say what to draw")
    given.setdefault("seed", 0)  # so that only what the axes say is different
    listed = [Cell(cell.place, resolve(session.model, cell.request)) for cell in cells(given, axes)]
    path = targets(out, 1)[0]
    places = targets(keep, len(listed)) if keep else []
    pictures: dict[tuple[int, int, int], Image.Image] = {}
    try:
        for number, cell in enumerate(listed):
            image = _drawn(session, cell, number, len(listed))
            pictures[cell.place] = image
            if places:
                save_image(image, places[number], metadata=session.metadata)
    except KeyboardInterrupt:
        if pictures:
            save_image(sheet(pictures, axes), path)
            console.note(f"{len(pictures)} of {len(listed)} pictures were drawn; {path} has them")
        raise
    image = sheet(pictures, axes)
    save_image(image, path)
    if session.events:
        console.print_event("done", file=str(path), pictures=len(listed))
    else:
        console.out.print(f"{path}  {image.width}x{image.height}, {len(listed)} pictures", markup=False)


def _drawn(session: Session, cell: Cell, number: int, total: int) -> Image.Image:
    with session.watching(f"picture {number + 1} of {total}", {"picture": number + 1}) as (progress, watch):
        return next(batches(session.model, cell.request, progress=progress, watch=watch)).images[0]
