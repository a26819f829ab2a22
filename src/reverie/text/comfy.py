r"""The dialect of ComfyUI: `(a)` times 1.1, `(a:1.3)` exactly 1.3 whatever it stands in, `\(` and `\)`; no more.

The rules are those of ComfyUI's `comfy/sd1_clip.py`. Every bracketed piece is tokenised on its own, and neighbours are
not joined. An opening bracket that is never closed is text; a closing one that was never opened is text too, and takes
the next opening one with it, as ComfyUI's counter of brackets does.
"""

import re
from dataclasses import dataclass, field

from reverie.errors import RequestError
from reverie.text.emphasis import STEP
from reverie.text.pieces import (
    REAL,
    Blend,
    Piece,
    Prompt,
    Reading,
    Section,
    Stage,
    bounded,
    excerpt,
    limited,
    number,
    unmatched,
    unusual,
)

_TOKEN = re.compile(r"\\[()]|[()]|[^\\()]++|\\")
_WEIGHT = re.compile(rf"\s*+([+-]?{REAL}(?:[eE][+-]?[0-9]++)?)\s*+")
_EMBEDDING = re.compile(r"(?:^|(?<=\s))embedding:([^\s<\[]++)")
_TAG = re.compile(r"<(?:lora|lyco|hypernet):")


@dataclass(slots=True)
class _Brackets:
    """The tokens of a text and its bracketed groups.

    Attributes:
        opening: index of the token that opens a group -> the weight written at its end, or None.
        closing: indices of the tokens that close a group.
        unclosed, stray: how many brackets have no counterpart.
    """

    tokens: list[str]
    opening: dict[int, float | None] = field(default_factory=dict)
    closing: set[int] = field(default_factory=set)
    unclosed: int = 0
    stray: int = 0


def parse(text: str, reading: Reading) -> Prompt:
    """Read a prompt. Never fails; what cannot have been meant is in the warnings."""
    warnings: list[str] = []
    if match := _TAG.search(text):
        warnings.append(f"{excerpt(text[match.start() :])} is text in dialect comfy, which loads networks elsewhere")
    pieces: tuple[Piece, ...] = (Piece(text),)
    if reading.emphasis:
        brackets = _brackets(text)
        pieces = _pieces(brackets) or (Piece(""),)
        warnings += unmatched(brackets.unclosed, "opening") + unmatched(brackets.stray, "closing") + unusual(pieces)
    found = (name.rstrip(",") for piece in pieces for name in _EMBEDDING.findall(piece.text))
    names = tuple(dict.fromkeys(name for name in found if name))
    stage = Stage((Section(pieces),))
    return Prompt("comfy", reading.constant(stage), embeddings=names, warnings=limited(warnings))


def _brackets(text: str) -> _Brackets:
    """Match the brackets of a text, and cut the written weights from its tokens."""
    found = _Brackets(_TOKEN.findall(text))
    stack: list[int] = []
    debt = 0  # closing brackets that were never opened; each takes the next opening one with it
    for i, token in enumerate(found.tokens):
        if token == "(" and debt and not stack:
            debt -= 1
            found.unclosed += 1
        elif token == "(":
            stack.append(i)
        elif token == ")" and stack:
            opening = stack.pop()
            found.opening[opening] = _cut_weight(found.tokens, opening, i)
            found.closing.add(i)
        elif token == ")":
            debt += 1
            found.stray += 1
    found.unclosed += len(stack)
    return found


def _cut_weight(tokens: list[str], opening: int, closing: int) -> float | None:
    """Cut `:1.3` from the end of a group and give the number; None where there is none, or nothing before it."""
    text, colon, weight = tokens[closing - 1].rpartition(":")
    match = _WEIGHT.fullmatch(weight)
    if not colon or not match or (not text and closing == opening + 2):
        return None
    tokens[closing - 1] = text
    return bounded(float(match.group(1)))


def _pieces(brackets: _Brackets) -> tuple[Piece, ...]:
    """Walk the tokens with the weights of the open groups; each bracket ends a piece."""
    pieces: list[Piece] = []
    weights, texts = [1.0], [""]

    def end() -> None:
        if text := "".join(texts):
            pieces.append(Piece(text, weights[-1]))
        texts.clear()

    for i, token in enumerate(brackets.tokens):
        if i in brackets.opening:
            end()
            written = brackets.opening[i]
            weights.append(bounded(weights[-1] * STEP) if written is None else written)
        elif i in brackets.closing:
            end()
            weights.pop()
        else:
            texts.append(token[1:] if token in {"\\(", "\\)"} else token)
    end()
    return tuple(pieces)


def show(prompt: Prompt) -> str:
    """Print a prompt in this dialect, so that reading it again gives the same pieces.

    Raises:
        RequestError: it holds what this dialect has no words for: schedules, AND, BREAK, blends, networks.
    """
    stage = prompt.only_stage()
    section = stage.sections[0] if stage and len(stage.sections) == 1 else None
    if section is None or isinstance(section, Blend) or prompt.networks:
        raise RequestError(
            "dialect comfy has no words for schedules, AND, BREAK, blends and networks, which this prompt has some of"
        )
    shown: list[str] = []
    bare = False
    for i, piece in enumerate(section.pieces):
        text = re.sub(r"[()]", r"\\\g<0>", piece.text)
        # Two bare neighbours would be read as one, and a backslash would escape the bracket behind it.
        last = i == len(section.pieces) - 1
        bare = piece.weight == 1 and not bare and (last or not text.endswith("\\"))
        shown.append(text if bare else f"({text}:{number(piece.weight)})")
    return "".join(shown)
