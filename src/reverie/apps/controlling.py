"""`reverie control`: the picture that a ControlNet is steered by, made from another."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reverie.apps import console
from reverie.control.registry import Job, Preprocessor, load_all
from reverie.control.weights import WEIGHTS
from reverie.engine.image import picture_format, save_image
from reverie.engine.sources import read_mask, read_picture
from reverie.errors import RequestError

TRANSPARENT = {"PNG", "WEBP", "AVIF"}


def run_control(name: str, source: str, out: Path, options: Sequence[str], how: dict[str, Any]) -> None:
    """Write the control picture of a picture file.

    Args:
        name: of a preprocessor, ours or another program's.
        options: `name=value` each.
        how: `resolution`, `mask` and `weights` (files or None) and `device`.

    Raises:
        RequestError: no such preprocessor or option, a picture or mask that cannot be read, weights or OpenCV missing.
        OutputError: it cannot be written there.
    """
    preprocessor = load_all()[name]
    form = picture_format(out)
    settings = preprocessor.settings(parsed(options))
    if preprocessor.name == "inpaint" and form not in TRANSPARENT:
        raise RequestError(f"{out} cannot hold the hole that inpaint makes; name a .png or .webp file")
    image = read_picture(source).convert("RGB")
    mask = None if how["mask"] is None else np.asarray(read_mask(how["mask"], image.size))
    job = Job(mask, how["weights"], how["device"])
    with console.busy(preprocessor.name):
        answer = preprocessor.run(np.asarray(image), settings, job=job, resolution=how["resolution"])
    save_image(Image.fromarray(answer), out, metadata=False)
    console.out.print(f"{out}  {preprocessor.name}  {answer.shape[1]}x{answer.shape[0]}", markup=False)


def parsed(options: Sequence[str]) -> dict[str, str]:
    """`["low=50"]` as a table.

    Raises:
        RequestError: not `name=value`, or one name twice.
    """
    table: dict[str, str] = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or name.strip() in table:
            raise RequestError(f"option {text!r}: expected name=value, each name once")
        table[name.strip()] = value
    return table


def run_list(as_json: bool) -> None:
    """Print every preprocessor with its options, other names, and whether its weights are here."""
    table = load_all()
    if as_json:
        console.print_json([_facts(table[name], table.aliases(name)) for name in table])
        return
    for name in table:
        entry = table[name]
        needs = "" if entry.learned is None else f"  [weights: {_whereabouts(entry.learned)}]"
        console.out.print(f"{name:<18} {entry.summary}{needs}", markup=False)
        for option in entry.options:
            console.out.print(f"    {option.name}={option.default}: {option.help} ({option.expected})", markup=False)
        others = table.aliases(name)
        if others:
            console.out.print(f"    also {', '.join(others)}", markup=False)


def _facts(entry: Preprocessor, aliases: Sequence[str]) -> dict[str, Any]:
    options = [
        {"name": o.name, "default": o.default, "help": o.help, "expected": o.expected, "choices": list(o.choices)}
        for o in entry.options
    ]
    weights = None if entry.learned is None else _whereabouts(entry.learned)
    return {"name": entry.name, "summary": entry.summary, "source": entry.source, "aliases": list(aliases),
            "options": options, "weights": weights}  # fmt: skip


def _whereabouts(name: str) -> str:
    """The path of a file of weights, or what fetches it."""
    try:
        return str(WEIGHTS[name].find())
    except RequestError:
        return f"{WEIGHTS[name].file} is missing, {WEIGHTS[name].fetched_by}"
