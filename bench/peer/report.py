"""The figures in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from common import versions

from peer.load import QUIET
from peer.variants import MEASURES, REFERENCE, VARIANTS

Figures = Mapping[str, Any]


def report(figures: Figures, machine: Mapping[str, Any]) -> str:
    """A table for each thing that was measured, in the order of `MEASURES`, and where and with what."""
    parts = [table(name, figures) for name in MEASURES if figures.get(name)]
    return "\n\n".join([*parts, note(figures, machine)])


def table(name: str, figures: Figures) -> str:
    """One thing that was measured, a row a program; those that failed with the reason."""
    found, measure = figures[name], MEASURES[name]
    columns = columns_of(measure.kind)
    lines = [f"### {measure.title}", "", f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for variant in (variant for variant in VARIANTS if variant in found):
        own = found[variant]
        if "failed" in own:
            lines.append(f"| {variant} | {own['failed']} |{' |' * (len(columns) - 1)}")
            continue
        lines.append(f"| {variant} | {' | '.join(cells(name, own, figures))} |")
    return "\n".join(lines)


def columns_of(kind: str) -> tuple[str, ...]:
    """The headings."""
    if kind == "picture":
        return "s (least–most)", "times diffusers", "first step s", "own GB", "total GB", "error", "computed in"
    return "s (least–most)", "times diffusers", "of the peak", "first s", "computed in"


def cells(name: str, own: Mapping[str, Any], figures: Figures) -> list[str]:
    """What stands in a row."""
    kind, seconds = MEASURES[name].kind, own["seconds"]
    mark = "\\*" if (own.get("foreign") or 0) > QUIET else ""
    timed = f"{number(seconds['median'])} ({number(seconds['min'])}–{number(seconds['max'])}){mark}"
    faster = ratio(figures[name].get(REFERENCE, {}), own)
    if kind == "picture":
        middle = [shown(own.get(key)) for key in ("first", "own GB", "total GB")]
        error = own.get("error")
        return [timed, faster, *middle, "" if error is None else f"{error:.1e}", own.get("note", "")]
    return [timed, faster, fraction(name, own, figures), shown(own.get("first")), own.get("note", "")]


def ratio(reference: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """How many times faster than the reference of the same run; empty where that was not measured."""
    if "seconds" not in reference or reference["run"] != own["run"]:
        return ""
    return f"{reference['seconds']['median'] / own['seconds']['median']:.2f}"


def fraction(name: str, own: Mapping[str, Any], figures: Figures) -> str:
    """Of the peak that the same run measured in the type that was computed in; empty where one is not known."""
    measure = MEASURES[name]
    tera = figures.get("work", {}).get(name)
    top = figures.get("runs", {}).get(own.get("run"), {}).get("peak", {}).get(own.get("note"))
    if tera is None or not top or measure.kind == "picture":
        return ""
    return f"{tera / own['seconds']['median'] / top:.0%}"


def shown(value: Mapping[str, float] | None) -> str:
    """A median."""
    return "" if value is None else number(value["median"])


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def note(figures: Figures, machine: Mapping[str, Any]) -> str:
    """How it was measured, where and with what."""
    packages = versions(figures.get("packages", {}))
    rows = [own for name in MEASURES for own in figures.get(name, {}).values()]
    loads = [own["foreign"] for own in rows if own.get("foreign") is not None]
    others = f"Others used up to {max(loads):.0%} of the processors meanwhile" if loads else "Foreign load is not known"
    stamps = {own["run"] for own in rows if "run" in own}
    runs = [run for stamp, run in figures.get("runs", {}).items() if stamp in stamps]
    rounds = sorted(own["seconds"]["rounds"] for own in rows if "seconds" in own)
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    return (
        "`python bench/peers.py`: every measurement is a process of its own, the programs in turn; medians of "
        f"{span(rounds)} round{'s' * (max(rounds, default=0) > 1)}, ratios within one run only. Random weights of "
        "the true size in float16 files; DDIM, guidance 7.5, one picture; single steps are those of a picture of 50, "
        "behind the two that prepare. `first`: the first step (or decoding), with "
        "compilation, packing, the prompt and, on a machine that Reverie is new to, its measuring. `of the peak`: the "
        "work that the step or the decoding is by definition (Winograd's tiles do less), over the seconds, over the "
        f"fastest product of matrices of that type in the same run ({peaks(runs)}). `own`: memory of the process "
        "alone, `total`: with the touched pages of the mapped file; both beyond what the interpreter takes. `error`: "
        "of the last latents against diffusers in float32, root mean square over that of these. "
        f"{others}; where that was more than {QUIET:.0%} there is a *. "
        f"{machine['cores']} cores of {machine['cpu']} ({', '.join(machine['instructions'])}), "
        f"{figures.get('device', 'cpu')}, Python {machine['python']}, {packages}; commit {commits}."
    )


def peaks(runs: Sequence[Mapping[str, Any]]) -> str:
    """The fastest products of matrices, least and most of the runs."""
    types = dict.fromkeys(name for run in runs for name in run["peak"])
    found = {name: [run["peak"][name] for run in runs if name in run["peak"]] for name in types}
    return ", ".join(
        f"{span([f'{top:.3g}' for top in sorted(tops)])} TFLOP/s in {name}" for name, tops in found.items()
    )


def span(values: Sequence[object]) -> str:
    """The first and the last of a sorted row; one where they are alike."""
    ends = [str(values[0]), str(values[-1])] if values else ["0"]
    return "–".join(dict.fromkeys(ends))
