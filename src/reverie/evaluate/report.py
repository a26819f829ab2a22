"""The numbers of an evaluation as JSON, and as Markdown for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from reverie.evaluate.scenes import Scored

# What each group is there to find out.
ABOUT: dict[str, tuple[str, ...]] = {
    "seen": ("object", "style", "colour", "count", "relation", "all"),
    "style": ("style", "object", "all"),
    "colour": ("colour", "object", "all"),
    "relation": ("relation", "object", "all"),
    "count": ("count", "object", "all"),
    "word": ("object", "all"),
}
TITLES = {
    "seen": "seen kinds of scenes", "style": "thing in a style it was never seen in",
    "colour": "thing in a colour it was never seen in", "relation": "two things never seen in this order",
    "count": "thing never seen three times", "word": "name that was never used",
}  # fmt: skip
WAYS = ("drawn", "true", "shuffled", "retrieved")


def scores_json(scored: Mapping[str, Scored]) -> dict[str, Any]:
    """Group -> way -> question -> numbers."""
    return {
        group: {way: {question: share.json() for question, share in ways.items()} for way, ways in vars(one).items()}
        for group, one in scored.items()
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report, from what `scores_json` and `Evaluation` have found."""
    parts = [_scores(report["scores"])]
    if report.get("distances"):
        parts.append(_distances(report["distances"]))
    parts.append(_copies(report["copies"]))
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _scores(scores: Mapping[str, Any]) -> str:
    rows = []
    for group, ways in scores.items():
        for n, question in enumerate(q for q in ABOUT[group] if q in ways["drawn"]):
            drawn = ways["drawn"][question]
            others = [_percent(ways[way][question]["share"]) for way in WAYS[1:]]
            right = f"**{_percent(drawn['share'])}** ({_percent(drawn['low'])} to {_percent(drawn['high'])})"
            rows.append([TITLES[group] if n == 0 else "", question, right, *others, str(drawn["asked"])])
    head = ["asked for", "right", "drawn (95 % interval)", "true pictures", "shuffled captions", "retrieval", "of"]
    return table(head, rows)


def _distances(distances: Mapping[str, Any]) -> str:
    rows = [
        [name, f"{one['fid']:.1f}", f"{one['kid'] * 1000:.1f}", str(one.get("pictures", ""))]
        for name, one in distances.items()
    ]
    return table(["drawn against true pictures", "FID", "KID x 1000", "pictures"], rows)


def _copies(copies: Mapping[str, Any]) -> str:
    rows = [
        [TITLES[group], by, f"{one['drawn']:.4f}", f"{one['true']:.4f}",
         f"{_percent(one['near_share'])} ({_percent(one['near_low'])} to {_percent(one['near_high'])})"]
        for group, ways in copies.items() for by, one in ways.items()
    ]  # fmt: skip
    head = ["distance to the nearest training picture", "by", "drawn", "true", "suspiciously near (1 % of true ones)"]
    return table(head, rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
