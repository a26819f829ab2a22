"""`reverie plan`: what drawing would take, without drawing."""

from pathlib import Path
from typing import Any

from reverie.apps import console
from reverie.apps.generating import asked, commissioned, memory_words, time_words
from reverie.engine.budget import Part, Plan, planned
from reverie.engine.generate import prepared
from reverie.engine.measures import shown
from reverie.engine.rates import Foretold, foretell

ROW = "{:<24}{:<16}{:<10}{:>7}{:>12}{:>12}{:>14}"


def run_plan(
    given: dict[str, Any], source: Path | None, model: str | None, options: dict[str, Any], as_json: bool
) -> None:
    """Print the plan of what `reverie generate` would draw.

    Args:
        given, source, model, options: as for `run_generate`.

    Raises:
        RequestError: a field out of range, or a limit of memory that no measures keep.
    """
    wanted, made_by = asked(given, source)
    loaded, request = commissioned(wanted, made_by, source, model, options, refiner="refine" in given)
    with console.busy("planning"):
        found = foretell(loaded, planned(loaded, request, prepared, loaded.memory, last=True))
    if as_json:
        console.print_json(as_dict(found))
        return
    size = f"{request.width}x{request.height}, " if request.width else ""
    pictures = request.travel.frames if request.travel else 1 if request.only is not None else request.count
    many = f"{pictures} pictures, {found.plan.batch} at a time" if pictures > 1 else "1 picture"
    console.out.print(f"{many}: {size}{request.steps} steps of {request.sampler}", markup=False)
    for line in lines(found):
        console.out.print(line, markup=False)


def lines(found: Foretold) -> list[str]:
    """The plan as a table and what is said about it."""
    plan = found.plan
    head = ROW.format("part", "place", "precision", "asked", "TFLOP", "weights", "activations")
    told = [head, *(_row(part) for part in plan.parts), ""]
    told.append(f"memory    {memory_words(plan.own, plan.mapped)} at most, in {plan.hardest}")
    if plan.packs:
        told.append(f"          {shown(plan.packs)} more for faster layers, where that is free")
    told.append(f"time      {time_words(found.expected)}")
    told.append(f"work      {sum(plan.flops.values()) / 1e12:.4g} TFLOP; {_rates(found)}")
    told.append(f"VAE       {'in one piece' if plan.tile is None else f'in tiles of {plan.tile} pixels'}")
    if plan.limit is not None:
        told.append(f"limit     {shown(plan.limit)}: {', '.join(plan.measures.words()) or 'nothing needs to be done'}")
    return told


def _row(part: Part) -> str:
    asked = f"{part.evaluations:g}"
    weights = shown(part.weights.own + part.weights.mapped)
    work = f"{part.tflop:.4g}" if part.tflop >= 1e-3 else f"{part.tflop:.1e}"
    return ROW.format(part.name[:23], part.place, part.precision, asked, work, weights, shown(part.activations))


def _rates(found: Foretold) -> str:
    each = (f"{kind} {rate / 1e9:.0f}" for kind, rate in found.rates.items())
    return f"this machine does, in GFLOP a second: {', '.join(each)}"


def as_dict(found: Foretold) -> dict[str, Any]:
    """The plan for programs: bytes, seconds and 10^12 operations."""
    plan: Plan = found.plan
    parts = [
        {
            "name": part.name, "place": part.place, "precision": part.precision, "evaluations": part.evaluations,
            "tflop": part.tflop, "flops": part.flops, "activations": part.activations,
            "weights": {"own": part.weights.own, "mapped": part.weights.mapped},
        }
        for part in plan.parts
    ]  # fmt: skip
    measures = {
        "batch": plan.batch, "tile": plan.tile, "offload": plan.measures.offload, "packed": plan.measures.packed,
        "blocks": plan.measures.blocks, "slices": plan.measures.slices,
    }  # fmt: skip
    return {
        "parts": parts, **found.figures(), "hardest": plan.hardest, "packs": plan.packs, "measures": measures,
        "limit": plan.limit, "device": plan.device, "flops": plan.flops, "rates": found.rates,
    }  # fmt: skip
