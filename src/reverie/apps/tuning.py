"""`reverie tune`: measure the switches that do less work, keep those inside a budget."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reverie.apps import console
from reverie.apps.generating import opened
from reverie.apps.progress import steps_progress
from reverie.engine import tuning
from reverie.engine.likeness import open_lpips
from reverie.errors import RequestError

SIZE = re.compile(r"(\d+)(?:x(\d+))?")
MOST_PROMPTS = 100


def run_tune(
    model: str | None,
    budget: str,
    wanted: Mapping[str, Any],
    prompts: Path | None,
    lpips: Path | None,
    options: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Measure, print a table, and write what is inside the budget where `fast` set to auto finds it.

    Args:
        budget: as `engine.tuning.Budget.of` reads it.
        wanted: `size` and `steps`; None for the model's own.
        prompts: a file with one a line.
        lpips: a folder with its weights.
        options: `device` and `precision` of `reverie.load`.

    Raises:
        RequestError: a budget, size or file of prompts that cannot be.
    """
    limit = tuning.Budget.of(budget)
    common = sizes(wanted.get("size")) | ({} if wanted.get("steps") is None else {"steps": wanted["steps"]})
    trial = tuning.Trial(
        read_prompts(prompts) if prompts else tuning.PROMPTS, common, None if lpips is None else open_lpips(lpips)
    )
    loaded = opened(model, options)
    precise = str(loaded.dtype) == "torch.float32"
    with steps_progress("measuring") as progress:
        found = tuning.tune(
            loaded, lambda: loaded if precise else opened(model, {**options, "precision": "float32"}), trial, limit,
            progress,
        )  # fmt: skip
    path = tuning.remember(loaded, limit, found)
    if as_json:
        told = [asdict(one) | {"inside": limit.allows(one)} for one in found.measured]
        console.print_json({"budget": str(limit), "measured": told, "fields": found.fields, "file": str(path)})
        return
    for line in table(found, limit):
        console.out.print(line, markup=False)
    console.note(f"{told_chosen(found, limit)}; written to {path}")


def sizes(text: str | None) -> dict[str, int]:
    """`"512"` or `"512x768"` as width and height.

    Raises:
        RequestError: neither.
    """
    if text is None:
        return {}
    match = SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise RequestError(f"size is {text!r}; expected pixels, 512 or 512x768")
    return {"width": int(match[1]), "height": int(match[2] or match[1])}


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a file that are not empty.

    Raises:
        RequestError: it cannot be read, or has none or too many.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the prompts in {path}: {str(error)[:100]}") from None
    found = tuple(line.strip() for line in lines if line.strip())
    if not 0 < len(found) <= MOST_PROMPTS:
        raise RequestError(f"{path} has {len(found)} prompts; expected one a line, 1 to {MOST_PROMPTS}")
    return found


def table(found: tuning.Tuned, budget: tuning.Budget) -> list[str]:
    """A line for each switch: speed (least to most), PSNR, SSIM, error of latents, LPIPS where it was measured."""
    wide = max(len(one.name) for one in found.measured)
    with_lpips = any(one.lpips is not None for one in found.measured)
    head = f"{'switch':<{wide}}  {'speed':>18}  {'PSNR':>7}  {'SSIM':>6}  {'latents':>8}"
    lines = [head + ("   LPIPS" if with_lpips else "")]
    for one in sorted(found.measured, key=lambda m: -m.speed):
        speed = f"{one.speed:.2f} ({one.low:.2f}-{one.high:.2f})"
        line = f"{one.name:<{wide}}  {speed:>18}  {one.psnr:>4.1f} dB  {one.ssim:>6.4f}  {one.latents:>8.1e}"
        line += f"  {one.lpips:>6.4f}" if one.lpips is not None else ""
        lines.append(line + ("" if budget.allows(one) else "  outside"))
    return lines


def told_chosen(found: tuning.Tuned, budget: tuning.Budget) -> str:
    """What is kept, in words."""
    if found.chosen is None:
        return f"nothing is faster inside {budget}: --fast auto draws exactly"
    return f"--fast auto is now {found.chosen.name}: {found.chosen.speed:.2f} times as fast inside {budget}"
