"""`reverie inspect` and `reverie samplers`."""

from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from reverie.apps import console
from reverie.checkpoint.packed import PackedTensor
from reverie.diffusion.spacing import SPACINGS
from reverie.engine.hashes import hash_paths
from reverie.families.base import Parts
from reverie.families.detect import load_parts
from reverie.sampling.guides import listing
from reverie.sampling.registry import load_all
from reverie.text.count import count
from reverie.text.tokenizer import ClipTokenizer


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
                "precision": _precision(module),
                "files": [str(file) for file in identity.files[name]],
            }
            for name, module in parts.modules().items()
        },
        "defaults": {
            "sampler": defaults.sampler, "spacing": defaults.spacing, "steps": defaults.steps,
            "guidance_scale": defaults.guidance_scale, "width": defaults.width, "height": defaults.height,
            "upscaler": defaults.upscaler,
        },
        "sha256": hash_paths(files),
    }  # fmt: skip


def _precision(module: nn.Module) -> str:
    """The types of its numbers, packed ones by the name of their packing, the most frequent first."""
    counts = Counter(
        p.packed.packing if isinstance(p, PackedTensor) else str(p.dtype).removeprefix("torch.")
        for p in module.parameters()
    )
    return " and ".join(name for name, _ in counts.most_common())


def run_samplers(as_json: bool) -> None:
    """Print the tables of samplers and spacings."""
    samplers = load_all()
    rows: list[dict[str, Any]] = [
        {
            "name": name, "order": entry.order, "evaluations": entry.evaluations(20), "stochastic": entry.stochastic,
            "options": list(entry.options), "source": entry.source, "aliases": samplers.aliases(name),
        }
        for name, entry in sorted((name, samplers[name]) for name in samplers)
    ]  # fmt: skip
    spacings: list[dict[str, Any]] = [
        {
            "name": name, "source": SPACINGS[name].source, "options": list(SPACINGS[name].options),
            "aliases": SPACINGS.aliases(name),
        }
        for name in sorted(SPACINGS)
    ]  # fmt: skip
    if as_json:
        console.print_json({"samplers": rows, "spacings": spacings})
        return
    console.out.print("samplers (evaluations for 20 steps)")
    for row in rows:
        order = "stochastic" if row["stochastic"] else f"order {row['order']}"
        _entry(row, f"{order}, {row['evaluations']} evaluations")
    console.out.print("\nspacings")
    for row in spacings:
        _entry(row)


def _entry(row: dict[str, Any], facts: str = "") -> None:
    """A few lines about one entry of a table."""
    lines = [row["source"]]
    lines += [f"options {', '.join(row['options'])}"] if row.get("options") else []
    lines += [f"also {', '.join(row['aliases'])}"] if row["aliases"] else []
    console.out.print(f"{row['name']:<24}{facts or lines.pop(0)}", markup=False)
    for line in lines:
        console.out.print(f"{'':<24}{line}", markup=False, style="dim")


def run_guides(as_json: bool) -> None:
    """Print the table of guidance wrappers."""
    rows = listing()
    if as_json:
        console.print_json(rows)
        return
    for row in rows:
        _entry({**row, "options": []}, row["summary"])
        for setting in row["settings"]:
            allowed = ", ".join(setting["choices"]) or _range(setting)
            text = (
                f"  {setting['name']} = {setting['default']}  {setting['description']}{f' ({allowed})' * bool(allowed)}"
            )
            console.out.print(f"{'':<24}{text}", markup=False, style="dim")


def _range(setting: dict[str, Any]) -> str:
    low, high = setting["low"], setting["high"]
    if low is None and high is None:
        return ""
    return f"{'' if low is None else low} to {'' if high is None else high}".strip()


def run_tokens(prompt: str, dialect: str, model: str | None, as_json: bool) -> None:
    """Print how many tokens a prompt has and where its chunks end."""
    tokenizer = ClipTokenizer.published() if model is None else load_parts(Path(model)).tokenizer
    found = count(prompt, tokenizer, dialect=dialect)
    if as_json:
        console.print_json(found.as_dict())
        return
    plural = "" if found.chunks == 1 else "s"
    console.out.print(
        f"{found.tokens} tokens in {found.chunks} chunk{plural} of {found.room}; room for {found.until_next} more"
    )
    for number, part in enumerate(found.parts, 1):
        for stage in part.stages:
            about = [f"part {number}, weight {part.weight:g}"] if len(found.parts) > 1 else []
            about += [f"up to step {stage.until}"] if len(part.stages) > 1 else []
            if about:
                console.out.print(", ".join(about), style="bold")
            for chunk in stage.chunks:
                words = " ".join(t.text if t.weight == 1 else f"{t.text}:{t.weight:.3g}" for t in chunk)
                console.out.print(f"{len(chunk):>4} | {words}", markup=False)
    for warning in found.warnings:
        console.note(warning)
