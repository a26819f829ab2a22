"""What a prompt says, in whatever dialect it is written: weighted pieces, stages over the steps, parts, networks."""

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

SANE = 5.0  # beyond it a weight breaks the picture; the sliders of the common interfaces end at 2
LIMIT = 1000.0  # weights are held within ±LIMIT, so that no text can bring infinity into a network
MOST_WARNINGS = 20
# Possessive quantifiers (`++`) never give back what they took: no text makes such patterns slow.
REAL = r"(?:[0-9]++\.?+[0-9]*+|\.[0-9]++)"


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is tokenised on its own, and the weight of its tokens."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Section:
    """Pieces that a text encoder reads together, in chunks of their own; at least one piece."""

    pieces: tuple[Piece, ...] = (Piece(""),)


@dataclass(frozen=True, slots=True)
class Blend:
    """A weighted sum of the encodings of sections (Compel's `.blend`).

    Attributes:
        normalise: whether the weights are divided by their sum.
    """

    sections: tuple[Section, ...]
    weights: tuple[float, ...]
    normalise: bool = True


@dataclass(frozen=True, slots=True)
class Stage:
    """What the network is told at one time: sections that are encoded apart and joined along the token axis.

    Attributes:
        weights: one a section; where it is not 1 the section is moved between the empty prompt and itself.
    """

    sections: tuple[Section | Blend, ...] = (Section(),)
    weights: tuple[float, ...] = (1.0,)


Stages = tuple[tuple[int, Stage], ...]
"""`(last step, stage)`, steps counted from 1, in order; the last one ends at the last step."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of the prompts that `AND` composes (Liu et al. 2022, Composable Diffusion).

    Attributes:
        weight: denoised = uncond + scale * sum of `weight * (cond - uncond)`.
        stages: over the steps of the first pass.
        second: over the steps of the second (hires) pass; empty where there is none.
    """

    weight: float
    stages: Stages
    second: Stages = ()

    def at(self, step: int, *, second: bool = False) -> Stage:
        """Give the stage of a step, counted from 1; a step beyond the end has the last stage."""
        stages = self.second if second else self.stages
        return next((stage for until, stage in stages if step <= until), stages[-1][1])


@dataclass(frozen=True, slots=True)
class Network:
    """An extra network that the prompt asks for, `<lora:name:te:unet:dyn>`.

    Attributes:
        kind: `lora` (also LyCORIS) or `hypernet`.
        name: the file's stem, or the alias in its metadata.
        text: the weight in the text encoder; for a hypernet the only weight.
        unet: the weight in the U-Net.
        rank: the rank to which a dynamic LoRA is cut; None for all of it.
    """

    kind: str
    name: str
    text: float = 1.0
    unet: float = 1.0
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that was understood.

    Attributes:
        dialect: the canonical name of the dialect it was written in.
        networks: in the order of the text, duplicates kept.
        embeddings: names of textual inversions that the dialect marks (ComfyUI's `embedding:name`); their text stays.
        warnings: one line each, for the user; empty where everything was read as it must have been meant.
    """

    dialect: str
    parts: tuple[Part, ...]
    networks: tuple[Network, ...] = ()
    embeddings: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def only_stage(self) -> Stage | None:
        """Give the stage that is the whole prompt; None where it has several, or a weight of its own."""
        stages = {stage for part in self.parts for _, stage in (*part.stages, *part.second)}
        return stages.pop() if len(stages) == len(self.parts) == 1 and self.parts[0].weight == 1 else None


@dataclass(frozen=True, slots=True)
class Reading:
    """How a text is to be read.

    Attributes:
        steps: of the first pass, at least 1.
        second_pass: steps of the second pass, or None.
        emphasis: False reads weights as text ("Emphasis: None" in A1111).
        negative: a negative prompt without `AND` has no weight of its own: a `:1.2` at its end is text.
    """

    steps: int
    second_pass: int | None = None
    emphasis: bool = True
    negative: bool = False

    def constant(self, stage: Stage) -> tuple[Part, ...]:
        """Give the parts of a prompt whose one stage holds throughout."""
        second = () if self.second_pass is None else ((self.second_pass, stage),)
        return (Part(1.0, ((self.steps, stage),), second),)


def bounded(weight: float) -> float:
    """Hold a weight within ±LIMIT."""
    return max(-LIMIT, min(LIMIT, weight))


def number(value: float) -> str:
    """Print a number so that it reads back equal, without an exponent, which prompts have no syntax for."""
    return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")


def unmatched(count: int, kind: Literal["opening", "closing"]) -> list[str]:
    """Warn of brackets without a counterpart that are text; nothing where there are none."""
    other = "closing" if kind == "opening" else "opening"
    has, are = ("have", "are") if count > 1 else ("has", "is")
    brackets = f"bracket{'s' if count > 1 else ''}"
    return [f"{count} {kind} {brackets} {has} no {other} one and {are} read as text"] if count else []


def merged(pieces: Iterable[tuple[str, float]]) -> tuple[Piece, ...]:
    """Join neighbours of equal weight and leave out empty ones; one empty piece where nothing is left."""
    texts: list[list[str]] = []
    weights: list[float] = []
    for text, weight in pieces:
        if weights and weights[-1] == weight:
            texts[-1].append(text)
        elif text:
            texts.append([text])
            weights.append(weight)
    return tuple(Piece("".join(t), w) for t, w in zip(texts, weights, strict=True)) or (Piece(""),)


def excerpt(text: str, most: int = 40) -> str:
    """Quote text in a message: on one line, cut in the middle."""
    text = " ".join(text[:1000].split()) if len(text) > most else text
    return repr(text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}")


def unusual(pieces: Iterable[Piece]) -> list[str]:
    """Warn of weights that no picture survives."""
    return [
        f"the weight {piece.weight:g} of {excerpt(piece.text)} is far outside the useful range of about 0 to 2"
        for piece in pieces
        if abs(piece.weight) > SANE
    ]


def limited(warnings: Iterable[str]) -> tuple[str, ...]:
    """Say everything once, and not more than a screen of it."""
    unique = tuple(dict.fromkeys(warnings))
    more = len(unique) - MOST_WARNINGS
    return unique if more <= 0 else (*unique[:MOST_WARNINGS], f"and {more} more warnings of this kind")
