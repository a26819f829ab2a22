"""Prompts of any length: weighted tokens, cut into chunks as long as the text encoder's context.

Every piece is tokenised on its own, so that each id has one weight. A chunk is framed as the tokenizer frames a prompt
that fits: CLIP's is BOS, 75 words, EOS and padding. Nothing is ever cut off.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from reverie.errors import RequestError
from reverie.registry import Registry
from reverie.text.pieces import Section
from reverie.text.tokenizer import LENGTH, ClipTokenizer, Encoded

BACKTRACK = 20  # "comma padding backtrack" of A1111, for a context of 77
KEPT_TOGETHER = 8  # ComfyUI breaks no piece of fewer tokens (`max_word_length` of comfy/sd1_clip.py)
PLACEHOLDER = 0  # the id under a vector; any word would do, but not one that could pass for the end of the text


class PromptTokenizer(Protocol):
    """What prompts need of a tokenizer; `ClipTokenizer` and `T5Tokenizer` have it."""

    @property
    def max_length(self) -> int:
        """The ids of a framed prompt."""

    def encode(self, text: str) -> list[int]:
        """Give the ids of the words alone."""

    def frame(self, words: Sequence[int]) -> Encoded:
        """Give the ids that a text encoder reads."""

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of ids."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One row for a text encoder of `L = tokenizer.max_length` positions.

    Attributes:
        ids: `L` ids.
        weights: one an id; 1 for what frames the words.
        pieces: index of the piece that each id comes from; -1 for what frames the words.
        words: `(position, name)` of each textual inversion, whose vectors begin there.
        used: how many ids are words.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    pieces: tuple[int, ...]
    words: tuple[tuple[int, str], ...] = ()
    used: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """What is never split: an id, or all the vectors of a textual inversion.

    Attributes:
        size: how many positions it takes.
        name: the textual inversion's; empty for an id.
    """

    id: int
    weight: float
    piece: int
    size: int = 1
    name: str = ""


Row: TypeAlias = list[Token]
Split: TypeAlias = Callable[[list[Token], PromptTokenizer, int, int], list[Row]]
"""`(tokens, tokenizer, room, backtrack)`: cut tokens into rows of at most `room` positions."""

SPLITS: Registry[Split] = Registry("way to split long prompts")


def chunked(
    section: Section,
    tokenizer: PromptTokenizer,
    *,
    split: str = "commas",
    comma_backtrack: int | None = None,
    sizes: Mapping[str, int] | None = None,
) -> list[Chunk]:
    """Give the chunks of a section, at least one.

    Args:
        split: a name of `SPLITS`: `commas` as A1111, `words` as ComfyUI, `sentences` as Compel.
        comma_backtrack: how many tokens may move to the next chunk so that it begins behind a comma; 0 for none.
            None is A1111's 20 of 75, in proportion for shorter encoders.
        sizes: the textual inversions by name, with their numbers of vectors. A name is found where its tokens are, the
            longest first.

    Raises:
        RequestError: a textual inversion with more vectors than a chunk has room for.
    """
    room, start = _room(tokenizer)
    names = _Names(sizes or {}, tokenizer, room)
    tokens: list[Token] = []
    for i, piece in enumerate(section.pieces):
        for text in names.apart(piece.text):
            tokens += names.found(tokenizer.encode(text), piece.weight, i)
    if comma_backtrack is None:
        comma_backtrack = round(BACKTRACK * room / (LENGTH - 2))
    rows = SPLITS[split](tokens, tokenizer, room, comma_backtrack)
    return [_framed(row, tokenizer, start) for row in rows or [[]]]


def _room(tokenizer: PromptTokenizer) -> tuple[int, int]:
    """Give the number of words of a chunk, and the position of the first."""
    framed = tokenizer.frame([PLACEHOLDER] * tokenizer.max_length)
    return tokenizer.max_length - framed.cut, framed.ids.index(PLACEHOLDER)


def room_of(tokenizer: PromptTokenizer) -> int:
    """Give the number of words that a chunk has room for."""
    return _room(tokenizer)[0]


def _framed(row: Row, tokenizer: PromptTokenizer, start: int) -> Chunk:
    """Put around a row what frames it; `start` is the position of its first id."""
    ids: list[int] = []
    words = []
    for token in row:
        if token.name:
            words.append((start + len(ids), token.name))
        ids += [token.id] * token.size
    rest = tokenizer.max_length - len(ids) - start
    return Chunk(
        tuple(tokenizer.frame(ids).ids),
        (*[1.0] * start, *(token.weight for token in row for _ in range(token.size)), *[1.0] * rest),
        (*[-1] * start, *(token.piece for token in row for _ in range(token.size)), *[-1] * rest),
        tuple(words),
        len(ids),
    )


class _Names:
    """Finds the names of textual inversions among ids."""

    def __init__(self, sizes: Mapping[str, int], tokenizer: PromptTokenizer, room: int) -> None:
        self._by_first: dict[int, list[tuple[list[int], str, int]]] = {}
        for name, size in sizes.items():
            if not 1 <= size <= room:
                raise RequestError(f"embedding {name!r} has {size} vectors; this text encoder has room for 1 to {room}")
            if ids := tokenizer.encode(name):
                self._by_first.setdefault(ids[0], []).append((ids, name, size))
        for entries in self._by_first.values():
            entries.sort(key=lambda entry: -len(entry[0]))
        marked = sorted((n for n in sizes if not (n[0].isalnum() and n[-1].isalnum())), key=len, reverse=True)
        self._marked = re.compile(f"({'|'.join(map(re.escape, marked))})", re.IGNORECASE) if marked else None

    def apart(self, text: str) -> list[str]:
        """Cut a text around names like `<cat>`, which the tokenizer would join with what stands beside them."""
        return self._marked.split(text) if self._marked else [text]

    def found(self, ids: Sequence[int], weight: float, piece: int) -> list[Token]:
        """Give the tokens of one piece."""
        tokens, at = [], 0
        while at < len(ids):
            for name_ids, name, size in self._by_first.get(ids[at], ()):
                if ids[at : at + len(name_ids)] == name_ids:
                    tokens.append(Token(PLACEHOLDER, weight, piece, size, name))
                    at += len(name_ids)
                    break
            else:
                tokens.append(Token(ids[at], weight, piece))
                at += 1
        return tokens


def _length(row: Sequence[Token]) -> int:
    return sum(token.size for token in row)


def _mark(tokenizer: PromptTokenizer, mark: str) -> int:
    """Give the id of a punctuation mark behind a word."""
    return tokenizer.encode(f"a{mark}")[-1]


def _commas(tokens: list[Token], tokenizer: PromptTokenizer, room: int, backtrack: int) -> list[Row]:
    """Fill each row; where it is full, move what stands behind its last comma to the next one, if that is near.

    A comma that does not fit any more is no place to break, as in A1111.
    """
    comma = _mark(tokenizer, ",")
    rows: list[Row] = [[]]
    length, behind = 0, 0  # positions in the last row, and how many tokens of it stand up to the last comma
    for token in tokens:
        is_comma = token.id == comma and not token.name
        if behind and length == room and not is_comma and room - _length(rows[-1][:behind]) < backtrack:
            moved = rows[-1][behind:]
            del rows[-1][behind:]
            rows.append(moved)
            length, behind = _length(moved), 0
        if length + token.size > room:
            rows.append([])
            length, behind = 0, 0
        elif is_comma:
            behind = len(rows[-1]) + 1
        rows[-1].append(token)
        length += token.size
    return rows


def _words(tokens: list[Token], _tokenizer: PromptTokenizer, room: int, _backtrack: int) -> list[Row]:
    """Fill each row; a piece of few tokens that does not fit whole begins the next one."""
    rows: list[Row] = [[]]
    length = 0
    for piece in _by_piece(tokens):
        size = _length(piece)
        if length + size > room and size < min(KEPT_TOGETHER, room + 1):
            rows.append([])
            length = 0
        for token in piece:
            if length + token.size > room:
                rows.append([])
                length = 0
            rows[-1].append(token)
            length += token.size
    return rows


def _by_piece(tokens: list[Token]) -> list[Row]:
    """Group the tokens of a piece; a textual inversion is a group of its own."""
    groups: list[Row] = []
    for token in tokens:
        last = groups[-1][-1] if groups else None
        if last and last.piece == token.piece and not last.name and not token.name:
            groups[-1].append(token)
        else:
            groups.append([token])
    return groups


def _sentences(tokens: list[Token], tokenizer: PromptTokenizer, room: int, _backtrack: int) -> list[Row]:
    """Fill each row up to the last full stop in it, else the last of `. , ; :`, else the end of a word.

    Only CLIP's ids tell the end of a word; T5's pieces tell where one begins.
    """
    stop, *marks = (_mark(tokenizer, mark) for mark in ".,;:")
    rules: tuple[Callable[[Token], bool], ...] = (
        lambda token: token.id == stop,
        lambda token: token.id in marks,
        lambda token: bool(token.name) or (isinstance(tokenizer, ClipTokenizer) and tokenizer.ends_word(token.id)),
    )
    rows, start = [], 0
    while start < len(tokens):
        end, length = start, 0
        while end < len(tokens) and length + tokens[end].size <= room:
            length += tokens[end].size
            end += 1
        if end < len(tokens):
            end = next((last for rule in rules if (last := _last(tokens, start, end, rule))), end)
        rows.append(tokens[start:end])
        start = end
    return rows


def _last(tokens: list[Token], start: int, end: int, rule: Callable[[Token], bool]) -> int:
    """Give the place behind the last token of a span that a rule accepts; 0 where there is none."""
    return next((i + 1 for i in range(end - 1, start - 1, -1) if rule(tokens[i])), 0)


SPLITS.add("commas", _commas)
SPLITS.add("words", _words)
SPLITS.add("sentences", _sentences)
