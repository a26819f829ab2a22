r"""Emphasis as A1111 writes it: `(a)` times 1.1, `[a]` by 1.1, `(a:1.3)` times 1.3, `BREAK`, and `\` to escape.

The rules are those of AUTOMATIC1111's stable-diffusion-webui 1.10. They are not those of a bracket grammar: round and
square brackets are matched apart, so that `(a [b) c]` overlap, what is not closed reaches the end of the text, and a
backslash before anything but a bracket or a backslash vanishes.
"""

import itertools
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from reverie.text.pieces import REAL, Piece, Section, bounded, merged, number, unmatched

STEP = 1.1
# Up to this depth the factors are multiplied as A1111 does, the first to close first, so that weights are equal to
# the last bit and equal neighbours merge alike. Deeper, a running product keeps the time linear.
EXACT_DEPTH = 32
HUGE = 1e100  # holds the running product of a deep nest below infinity

_TOKEN = re.compile(rf"\\[()\[\]\\]|\\|:\s*+([+-]?{REAL})\s*+\)|[()\[\]]|[^\\()\[\]:]++|:")
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(slots=True)
class _Groups:
    """The groups of one kind of bracket, in the order in which they open.

    Group g multiplies the items from `starts[g]` up to `ends[g]` by `factors[g]`. `orders` counts both kinds as they
    close; `opened` holds those that are not closed yet.
    """

    factor: float
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    orders: list[int] = field(default_factory=list)
    opened: list[int] = field(default_factory=list)

    def open(self, item: int) -> None:
        self.opened.append(len(self.starts))
        self.starts.append(item)
        self.ends.append(0)
        self.factors.append(self.factor)
        self.orders.append(0)

    def close(self, item: int, weight: str | None, order: int) -> None:
        group = self.opened.pop()
        self.ends[group], self.orders[group] = item, order
        if weight:
            self.factors[group] = bounded(float(weight))


@dataclass(slots=True)
class _Marked:
    """A text cut at its marks: `items` are texts, or None for a BREAK."""

    items: list[str | None] = field(default_factory=list)
    round: _Groups = field(default_factory=lambda: _Groups(STEP))
    square: _Groups = field(default_factory=lambda: _Groups(1 / STEP))
    unclosed: int = 0
    stray: int = 0


def emphasised(text: str) -> tuple[tuple[Section, ...], list[str]]:
    """Give the sections between the BREAKs, and warnings. Never fails; time is linear in the text.

    An empty section at the end is left out, for a BREAK begins a new chunk only for what follows it.
    """
    marked = _marked(text)
    sections: list[list[tuple[str, float]]] = [[]]
    for item, weight in zip(marked.items, _weights(marked), strict=True):
        if item is None:
            sections.append([])
        elif item:
            sections[-1].append((item, weight))
    if len(sections) > 1 and not sections[-1]:
        sections.pop()
    return tuple(Section(merged(pieces)) for pieces in sections), _warnings(marked)


def _marked(text: str) -> _Marked:
    """Find the groups of both kinds of bracket."""
    found = _Marked()
    items, round_, square, closed = found.items, found.round, found.square, 0
    for match in _TOKEN.finditer(text):
        token, weight = match.group(0, 1)
        groups = round_ if weight or token in {"(", ")"} else square if token in {"[", "]"} else None
        if token[0] == "\\":
            items.append(token[1:])
        elif groups is None:
            items.extend(_broken(token) if "BREAK" in token else (token,))
        elif token in {"(", "["}:
            groups.open(len(items))
        elif groups.opened:
            groups.close(len(items), weight, closed)
            closed += 1
        else:
            found.stray += 1
            items.append(token)
    found.unclosed = len(round_.opened) + len(square.opened)
    for groups in (round_, square):
        while groups.opened:
            groups.close(len(items), None, closed)
            closed += 1
    return found


def _broken(text: str) -> Iterator[str | None]:
    """Cut text at its BREAKs, which take the space around them along."""
    parts = _BREAK.split(text)
    for i, part in enumerate(parts):
        if i:
            yield None
        before = part.rstrip() if i < len(parts) - 1 else part
        yield before.lstrip() if i else before


class _Holding:
    """The groups of one kind that hold at one item, innermost last."""

    def __init__(self, groups: _Groups) -> None:
        self._groups, self._coming = groups, 0
        self.held: list[int] = []
        self.products = [1.0]

    def move(self, item: int) -> int:
        """Go on to an item; give the next item at which anything changes."""
        groups, held = self._groups, self.held
        while held and groups.ends[held[-1]] <= item:
            held.pop()
            self.products.pop()
        starts, coming = groups.starts, self._coming
        while coming < len(starts) and starts[coming] <= item:
            if groups.ends[coming] > item:
                held.append(coming)
                self.products.append(max(-HUGE, min(HUGE, self.products[-1] * groups.factors[coming])))
            coming += 1
        self._coming = coming
        return min(
            groups.ends[held[-1]] if held else sys.maxsize, starts[coming] if coming < len(starts) else sys.maxsize
        )

    def factors(self) -> list[tuple[int, float]]:
        """Give the order of closing and the factor of each."""
        return [(self._groups.orders[group], self._groups.factors[group]) for group in self.held]


def _weights(marked: _Marked) -> Iterator[float]:
    """Give the weight of each item."""
    round_, square = _Holding(marked.round), _Holding(marked.square)
    item = 0
    while item < len(marked.items):
        following = min(round_.move(item), square.move(item), len(marked.items))
        yield from itertools.repeat(bounded(_product(round_, square)), following - item)
        item = following


def _product(round_: _Holding, square: _Holding) -> float:
    """Multiply the factors of all groups that hold."""
    if len(round_.held) + len(square.held) > EXACT_DEPTH:
        return round_.products[-1] * square.products[-1]
    factors = round_.factors() + square.factors()
    factors.sort()
    return math.prod((factor for _, factor in factors), start=1.0)


def _warnings(marked: _Marked) -> list[str]:
    """Say which brackets do not match."""
    found = []
    if marked.unclosed:
        found.append(
            f"{marked.unclosed} opening bracket{'s have' if marked.unclosed > 1 else ' has'} no closing one: "
            "the emphasis reaches the end of the text"
        )
    return found + unmatched(marked.stray, "closing")


# Words that A1111 acts upon; a backslash inside makes them text again, and vanishes.
_ACTIVE = re.compile(r"\bA(?=ND\b)|\bB(?=REAK\b)|<(?=\w+(?::|\Z))")
_SPECIAL = re.compile(r"[()\[\]\\]")
_FIELD = re.compile(r"[()\[\]\\:|]")


def show_sections(sections: tuple[Section, ...], *, nested: bool) -> str:
    """Print sections so that `emphasised` gives them again.

    Args:
        nested: whether the text will stand inside a schedule, where `:` and `|` are marks.
    """
    last = len(sections) - 1
    shown = [
        _show_pieces(section.pieces, nested=nested, edges=(nested and i == 0, nested and i == last))
        for i, section in enumerate(sections)
    ]
    if last and not shown[last]:
        shown.append("")  # for the last one of all is left out
    return " BREAK ".join(shown)


def _show_pieces(pieces: tuple[Piece, ...], *, nested: bool, edges: tuple[bool, bool]) -> str:
    """Print one section, bare where the weight is 1.

    Args:
        edges: whether space at the beginning and at the end is safe: next to BREAK and AND it is not.
    """
    shown = []
    for i, piece in enumerate(pieces):
        text = (_FIELD if nested else _SPECIAL).sub(r"\\\g<0>", piece.text)
        text = _ACTIVE.sub(r"\g<0>\\", text)
        lost = i == 0 and not edges[0] and piece.text[:1].isspace()
        lost |= i == len(pieces) - 1 and not edges[1] and piece.text[-1:].isspace()
        shown.append(text if piece.weight == 1 and not lost else f"({text}:{number(piece.weight)})")
    return "".join(shown)
