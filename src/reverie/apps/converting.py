"""`reverie convert`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from reverie.apps import console
from reverie.apps.doctoring import size
from reverie.apps.progress import steps_progress
from reverie.engine.convert import convert


def run_convert(source: Path, out: Path, options: dict[str, Any], as_json: bool) -> None:
    """Convert and say what was written.

    Args:
        options: as `reverie.engine.convert.convert` takes them.
    """
    with steps_progress("writing") as progress:
        made = convert(source, out, progress=progress, **options)
    if as_json:
        console.print_json(asdict(made) | {"path": str(made.path), "notes": list(made.notes)})
        return
    layout = "single file" if made.layout == "single" else "diffusers folder"
    what = f"{layout} of {made.family}" if made.family else "file"
    console.out.print(f"{made.path}: {what}, {made.tensors:,} tensors, {size(made.bytes)}", markup=False)
    for note in made.notes:
        console.note(note)
