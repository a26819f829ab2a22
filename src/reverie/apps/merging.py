"""`reverie merge`: models out of models, and LoRAs out of models and LoRAs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reverie.adapters.attach import Attachment
from reverie.adapters.factoring import Reduced, Target, extracted, resized
from reverie.adapters.lora import open_adapter
from reverie.adapters.lora_save import save_lora
from reverie.apps import console
from reverie.apps.doctoring import size
from reverie.apps.progress import steps_progress
from reverie.engine.convert import Converted
from reverie.engine.equipment import attached
from reverie.engine.extras import Lora
from reverie.engine.library import Library
from reverie.engine.merging import Merge, bake, merge
from reverie.engine.mixing import METHODS, Options
from reverie.engine.request import Request
from reverie.errors import OutputError, RequestError
from reverie.families.base import Parts
from reverie.families.detect import load_parts

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run_merge(first: str, others: Sequence[str], out: Path, how: dict[str, Any], to: dict[str, Any]) -> None:
    """Merge models and say what was written.

    Args:
        others: `MODEL` or `MODEL:WEIGHT`.
        how: method, base, blocks (`NAME=WEIGHT`), density, seed, weight.
        to: layout and dtype, as `convert` takes them.
    """
    library = Library.of_environment()
    models = tuple(_weighed(library, written, how["weight"]) for written in others)
    base = None if how["base"] is None else library.resolve(how["base"])
    merged = Merge(models, base, how["method"], _factors(how["blocks"]), Options(how["density"], how["seed"]))
    with steps_progress("merging") as progress:
        made = merge(library.resolve(first), merged, out, progress=progress, **to)
    _say(made, f"{METHODS.name(merged.method)} of {1 + len(models)} models")


def run_bake(model: str, loras: Sequence[str], out: Path, to: dict[str, Any]) -> None:
    """Write a model with LoRAs in its weights, and say what was written."""
    library = Library.of_environment()
    path = library.resolve(model)
    wanted = Request.of(loras=tuple(loras)).loras

    def attach(parts: Parts) -> list[Attachment]:
        return [_attachment(library, path, parts, lora) for lora in wanted]

    with steps_progress("baking") as progress:
        made = bake(path, attach, out, progress=progress, **to)
    _say(made, f"{len(wanted)} LoRA{'s' * (len(wanted) > 1)} in the weights")


def run_extract(base: str, tuned: str, out: Path, target: Target, dtype: str, dialect: str) -> None:
    """Write the difference of two models as a LoRA, and say how much of it is held."""
    library = Library.of_environment()
    one, other = (load_parts(library.resolve(name)) for name in (base, tuned))
    with steps_progress("layers") as progress:
        found = extracted(one, other, target, dtype=_dtype(dtype), progress=progress)
    _save(found, out, one, dialect)


def run_resize(lora: str, model: str | None, out: Path, target: Target, dialect: str) -> None:
    """Write a LoRA with other ranks, and say how much of it is held."""
    from reverie.engine.bundle import bundled_path

    library = Library.of_environment()
    path = bundled_path() if model is None else library.resolve(model)
    parts = load_parts(path)
    adapter = open_adapter(library.adapter(lora, "LoRA", path), parts)
    _save(resized(adapter, target), out, parts, dialect)


def _weighed(library: Library, written: str, usual: float) -> tuple[Path, float]:
    name, colon, number = written.rpartition(":")
    try:
        return library.resolve(name), float(number) if colon else usual
    except ValueError:
        return library.resolve(written), usual


def _factors(written: Sequence[str]) -> dict[str, float]:
    found = {}
    for pair in written:
        name, _, number = pair.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise RequestError(f"--block is {pair!r}; expected NAME=WEIGHT, as in IN04=0.5") from None
    return found


def _attachment(library: Library, model: Path, parts: Parts, lora: Lora) -> Attachment:
    adapter = open_adapter(library.adapter(lora.path, "LoRA", model), parts)
    console.note(f"{adapter.name}: {adapter.coverage.line()}")
    return attached(adapter, lora)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise RequestError(f"unknown type {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def _save(found: Reduced, out: Path, parts: Parts, dialect: str) -> None:
    if out.exists():
        raise OutputError(f"{out} is there already; remove it or choose another name")
    save_lora(found.deltas, out, parts, dialect=dialect)
    least, most = found.ranks
    ranks = f"rank {least}" if least == most else f"ranks {least} to {most}"
    layers = sum(map(len, found.deltas.values()))
    console.out.print(
        f"{out}: LoRA of {layers} layers, {ranks}, {size(out.stat().st_size)}; it holds {found.held:.2%} of the "
        "difference", markup=False,
    )  # fmt: skip


def _say(made: Converted, what: str) -> None:
    text = f"{made.path}: {what}, {made.family}, {made.tensors:,} tensors, {size(made.bytes)}"
    console.out.print(text, markup=False)
    for note in made.notes:
        console.note(note)
