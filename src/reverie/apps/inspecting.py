"""`reverie inspect` and `reverie samplers`."""

from collections import Counter
from pathlib import Path
from typing import Any

from reverie.apps import console
from reverie.diffusion.spacing import SPACINGS
from reverie.engine.image import hash_files
from reverie.families.base import Parts
from reverie.families.detect import load_parts
from reverie.sampling.registry import load_all


def report(path: Path, variant: str | None) -> dict[str, Any]:
    """What `path` is, as JSON; hashes its weights, which takes seconds for a large file."""
    return describe(load_parts(path, variant), path)


def show(report: dict[str, Any], as_json: bool) -> None:
    """Print a report as a table or as JSON."""
    if as_json:
        console.print_json(report)
        return
    rows = [(key, str(report[key])) for key in ("path", "family", "layout", "prediction")]
    parts = report["parts"].items()
    rows += [(name, f"{part['parameters']:,} parameters, {part['precision']}") for name, part in parts]
    rows += [("draws", ", ".join(f"{k} {v}" for k, v in report["defaults"].items() if v is not None))]
    rows += [("sha256", report["sha256"]), ("short hash", report["sha256"][:10])]
    rows += [("because", f"{claim}: {why}") for claim, why in report["evidence"]]
    for key, value in rows:  # one line each, never wrapped: it is grepped and copied
        console.out.print(f"{key:<14}{value}", markup=False)


def describe(parts: Parts, path: Path) -> dict[str, Any]:
    """What is known of a checkpoint, as JSON."""
    identity, defaults = parts.identity, parts.defaults
    files = sorted({file for of_part in identity.files.values() for file in of_part})
    return {
        "path": str(path),
        "family": identity.family,
        "layout": identity.layout,
        "prediction": identity.prediction,
        "evidence": [list(pair) for pair in identity.evidence],
        "parts": {
            name: {
                "parameters": sum(p.numel() for p in module.parameters()),
                "precision": _precision(Counter(str(p.dtype).removeprefix("torch.") for p in module.parameters())),
                "files": [str(file) for file in identity.files[name]],
            }
            for name, module in parts.modules().items()
        },
        "defaults": {
            "sampler": defaults.sampler, "spacing": defaults.spacing, "steps": defaults.steps,
            "guidance_scale": defaults.guidance_scale, "width": defaults.width, "height": defaults.height,
            "upscaler": defaults.upscaler,
        },
        "sha256": hash_files(tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)),
    }  # fmt: skip


def _precision(counts: Counter[str]) -> str:
    return " and ".join(name for name, _ in counts.most_common())


def run_samplers(as_json: bool) -> None:
    """Print the tables of samplers and spacings."""
    samplers = load_all()
    rows: list[dict[str, Any]] = [
        {
            "name": name, "order": entry.order, "evaluations": entry.evaluations(20), "stochastic": entry.stochastic,
            "source": entry.source, "aliases": samplers.aliases(name),
        }
        for name, entry in sorted((name, samplers[name]) for name in samplers)
    ]  # fmt: skip
    if as_json:
        console.print_json({"samplers": rows, "spacings": {name: SPACINGS.aliases(name) for name in SPACINGS}})
        return
    for row in rows:
        order = "stochastic" if row["stochastic"] else f"order {row['order']}"
        console.out.print(f"{row['name']:<10}{order}, {row['evaluations']} evaluations for 20 steps", markup=False)
        console.out.print(f"{'':<10}{row['source']}", markup=False)
        console.out.print(f"{'':<10}also {', '.join(row['aliases'])}", markup=False)
    for name in SPACINGS:
        aliases = ", ".join(SPACINGS.aliases(name))
        console.out.print(f"spacing {name}{f', also {aliases}' if aliases else ''}", markup=False)
