"""A stage of a prompt -> the context that a network attends to.

The text encoder is a port, `Encode`: this module knows nothing of networks, and an encoder nothing of prompts.
A model with several encoders embeds a stage once with each and joins the contexts along D.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from reverie.registry import Registry
from reverie.text.chunks import Chunk, PromptTokenizer, chunked
from reverie.text.pieces import Blend, Section, Stage

MOST_ROWS = 16  # chunks in one call of the encoder: bounds the memory that a very long prompt takes


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a text encoder reads.

    Attributes:
        ids: `(n, L)` int64, on the CPU.
        vectors: `(row, position, (k, D) vectors)`: token embeddings that stand in for those of the k ids from
            `position` on, before position embeddings are added.
        mask: `(n, L)` bool, False where no position may attend to; None where all may.
    """

    ids: Tensor
    vectors: tuple[tuple[int, int, Tensor], ...] = ()
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Encoding:
    """What a text encoder says, and what a stage becomes.

    Attributes:
        hidden: `(n, L, D)`; of a stage `(1, chunks * L, D)`.
        pooled: `(n, P)`, of encoders that have it; of a stage `(1, P)`, of its first chunk, without weights.
    """

    hidden: Tensor
    pooled: Tensor | None = None


Encode: TypeAlias = Callable[[Tokens], Encoding]
"""A text encoder; one that cannot replace vectors or mask refuses `Tokens` that ask for it."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A section after the encoder, before its weights: what a weighting works on.

    Attributes:
        hidden: `(n, L, D)` float32.
        weights: `(n, L, 1)` float32.
        pieces: `(n, L)`, the piece of each id; -1 for BOS, EOS and padding.
        piece_weights: one a piece.
        empty: `(1, L, D)` float32, the encoded empty prompt.
        masked: the section encoded with a mask `(n, L)`: `(n, L, D)` float32.
    """

    hidden: Tensor
    weights: Tensor
    pieces: Tensor
    piece_weights: tuple[float, ...]
    empty: Callable[[], Tensor]
    masked: Callable[[Tensor], Tensor]


Weighting: TypeAlias = Callable[[Encoded], Tensor]
"""Apply the weights: `(n, L, D)` float32."""

WEIGHTINGS: Registry[Weighting] = Registry("emphasis")


@dataclass(frozen=True)
class Embedder:
    """Turns stages into contexts with one tokenizer and one text encoder.

    Attributes:
        encode: the text encoder; it brings ids and vectors to its own device.
        weighting: a name of `WEIGHTINGS`: what weights do.
        split, comma_backtrack: where long prompts are cut; see `chunked`.
        vectors: the `(k, D)` vectors of textual inversions by the name that prompts call them by.
    """

    tokenizer: PromptTokenizer
    encode: Encode
    weighting: str = "original"
    split: str = "commas"
    comma_backtrack: int | None = None
    vectors: Mapping[str, Tensor] | None = None

    def __call__(self, stage: Stage) -> Encoding:
        """Encode a stage: `hidden (1, chunks * L, D)` in the precision of the encoder."""
        found = [self._entry(section) for section in stage.sections]
        contexts = [
            hidden if weight == 1 else torch.lerp(repeated(self._plain, hidden), hidden, weight)
            for (hidden, _), weight in zip(found, stage.weights, strict=True)
        ]
        return Encoding(torch.cat(contexts, dim=1).to(self.empty.hidden.dtype), found[0][1])

    @cached_property
    def empty(self) -> Encoding:
        """The empty prompt: `hidden (1, L, D)`."""
        return self.encode(self._tokens(chunked(Section(), self.tokenizer)))

    @property
    def _plain(self) -> Tensor:
        return self.empty.hidden.float()

    def _entry(self, entry: Section | Blend) -> tuple[Tensor, Tensor | None]:
        """Encode a section or blend: `(1, chunks * L, D)` float32, and the pooled vector."""
        if isinstance(entry, Section):
            return self._section(entry)
        found = [self._section(section) for section in entry.sections]
        total = sum(entry.weights) if entry.normalise else 1.0
        weights = [weight / total for weight in entry.weights]
        pooled = [p for _, p in found if p is not None]
        hidden = same_length([h for h, _ in found], self._plain)
        return _sum(weights, hidden), _sum(weights, pooled) if pooled else None

    def _section(self, section: Section) -> tuple[Tensor, Tensor | None]:
        sizes = {name: len(vectors) for name, vectors in (self.vectors or {}).items()}
        chunks = chunked(section, self.tokenizer, split=self.split, comma_backtrack=self.comma_backtrack, sizes=sizes)
        encoding = self._encoded(chunks, None)
        hidden = encoding.hidden.float()
        weights = tuple(piece.weight for piece in section.pieces)
        if any(weight != 1 for weight in weights):
            hidden = WEIGHTINGS[self.weighting](
                Encoded(
                    hidden,
                    torch.tensor([chunk.weights for chunk in chunks]).to(hidden)[..., None],
                    torch.tensor([chunk.pieces for chunk in chunks]),
                    weights,
                    lambda: self._plain,
                    lambda mask: self._masked(chunks, hidden, mask),
                )
            )
        pooled = None if encoding.pooled is None else encoding.pooled[:1]
        return hidden.flatten(0, 1)[None], pooled

    def _masked(self, chunks: Sequence[Chunk], hidden: Tensor, mask: Tensor) -> Tensor:
        """Encode the chunks again in which anything is masked."""
        rows = torch.nonzero(~mask.all(1)).flatten()
        again = self._encoded([chunks[row] for row in rows], mask[rows])
        return hidden.index_copy(0, rows.to(hidden.device), again.hidden.float())

    def _encoded(self, chunks: Sequence[Chunk], mask: Tensor | None) -> Encoding:
        """Encode chunks, a bounded number at a time."""
        parts = []
        for first in range(0, len(chunks), MOST_ROWS):
            rows = slice(first, first + MOST_ROWS)
            parts.append(self.encode(self._tokens(chunks[rows], None if mask is None else mask[rows])))
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Encoding(torch.cat([part.hidden for part in parts]), torch.cat(pooled) if pooled else None)

    def _tokens(self, chunks: Sequence[Chunk], mask: Tensor | None = None) -> Tokens:
        vectors = self.vectors or {}
        words = ((row, at, vectors[name]) for row, chunk in enumerate(chunks) for at, name in chunk.words)
        return Tokens(torch.tensor([chunk.ids for chunk in chunks]), tuple(words), mask)


def repeated(empty: Tensor, like: Tensor) -> Tensor:
    """Repeat the encoded empty prompt `(1, L, D)` to the length of a context `(1, chunks * L, D)`."""
    return empty.to(like).repeat(1, like.shape[1] // empty.shape[1], 1)


def same_length(contexts: Sequence[Tensor], empty: Tensor) -> list[Tensor]:
    """Pad contexts `(1, chunks * L, D)` to the longest with the encoded empty prompt `(1, L, D)`."""
    longest = max(contexts, key=lambda context: context.shape[1])
    padding = repeated(empty, longest)
    return [torch.cat([context, padding[:, context.shape[1] :]], dim=1) for context in contexts]


def _sum(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """Add terms with weights."""
    result = terms[0] * weights[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        result = result + term * weight
    return result


def original(text: Encoded) -> Tensor:
    """A1111's "Original": each vector times its weight, then each chunk scaled so that its mean is what it was."""
    weighted = text.hidden * text.weights
    before, after = (z.mean((1, 2), keepdim=True) for z in (text.hidden, weighted))
    return weighted * torch.where(after == 0, 1.0, before / after)


def no_norm(text: Encoded) -> Tensor:
    """A1111's "No norm": each vector times its weight."""
    return text.hidden * text.weights


def ignore(text: Encoded) -> Tensor:
    """A1111's "Ignore": no weights."""
    return text.hidden


def interpolate(text: Encoded) -> Tensor:
    """ComfyUI's: each vector moved from the empty prompt's at its position, z = empty + w * (z - empty)."""
    return _interpolated(text.hidden, text)


def _interpolated(hidden: Tensor, text: Encoded) -> Tensor:
    moved = (hidden - text.empty()) * text.weights + text.empty()
    return torch.where(text.weights == 1, hidden, moved)


def compel(text: Encoded) -> Tensor:
    """Compel's: interpolation and, for each piece of weight w < 1, a blend with the prompt in which it is masked.

    The weight in the blend is tan((1 - w) pi/2): 0 at w = 1, as much as the prompt itself at 0.5, all of it at 0
    (compel 2, embeddings_provider.py, DownweightMode.MASK).
    """
    terms, weights = [interpolate(text)], [1.0]
    for piece, weight in enumerate(text.piece_weights):
        own = text.pieces == piece
        if weight < 1 and own.any():
            terms.append(_interpolated(text.masked(~own), text))
            weights.append(math.tan((1 - max(1e-5, weight)) * math.pi / 2))
    return _sum([weight / sum(weights) for weight in weights], terms)


WEIGHTINGS.add("original", original)
WEIGHTINGS.add("no_norm", no_norm)
WEIGHTINGS.add("ignore", ignore)
WEIGHTINGS.add("interpolate", interpolate, ("comfy",))
WEIGHTINGS.add("compel", compel)
