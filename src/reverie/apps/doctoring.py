"""`reverie doctor`."""

from pathlib import Path

from reverie.apps import console
from reverie.apps.progress import steps_progress
from reverie.engine.doctor import PartReport, Report, examine

SHOWN = 8  # names of one list; --json has all of them


def run_doctor(path: Path, variant: str | None, as_json: bool) -> int:
    """Examine and print. Returns the exit code: 0 healthy, 1 something is wrong with it, 2 refused."""
    with steps_progress("reading") as progress:
        report = examine(path, variant, progress=progress)
    if as_json:
        console.print_json(report.as_dict())
    else:
        for key, value in _rows(report):  # one line each, never wrapped: it is grepped and copied
            console.out.print(f"{key:<14}{value}", markup=False)
    return report.exit_code


def _rows(report: Report) -> list[tuple[str, str]]:
    facts = ("path", "kind", "family", "variant", "prediction", "layout", "format")
    rows = [(key, getattr(report, key)) for key in facts if getattr(report, key)]
    rows += [(part.name, _part(part)) for part in report.parts]
    if report.kind == "checkpoint":
        rows += [("averaged copy", "yes" if report.averaged else "no"), ("pruned", "yes" if report.pruned else "no")]
    rows += [("on disk", size(report.on_disk))] if report.on_disk else []
    rows += [("memory", ", ".join(f"{size(n)} in {name}" for name, n in report.memory.items()))] * bool(report.memory)
    rows += [("fits", what) for what in report.fits]
    rows += [("note", note) for note in report.notes]
    rows += [("pickled code", f"would have called {call}; nothing was executed") for call in report.code]
    rows += [("because", f"{claim}: {why}") for claim, why in report.evidence]
    bad = [("not finite", f"{name}: {what}") for name, what in report.non_finite.items()]
    rows += bad[:SHOWN] + [("not finite", f"{len(bad) - SHOWN} more tensors")] * (len(bad) > SHOWN)
    rows += [("problem", problem) for problem in report.problems]
    healthy = {0: "nothing wrong was found", 1: "something is wrong with it", 2: "refused"}
    return [*rows, ("verdict", healthy[report.exit_code])]


def _part(part: PartReport) -> str:
    return f"{part.parameters:,} parameters in {part.tensors:,} tensors, {' and '.join(part.types)}"


def size(count: int) -> str:
    """Bytes, as people read them."""
    amount = float(count)
    for unit in ("bytes", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} GB"
