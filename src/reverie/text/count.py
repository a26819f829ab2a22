"""How many tokens a prompt has, and where its chunks end: the data behind `reverie tokens`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from reverie.text.chunks import Chunk, PromptTokenizer, chunked, room_of
from reverie.text.pieces import Blend, Section, Stage
from reverie.text.prompt import DIALECTS, parse


@dataclass(frozen=True)
class CountedToken:
    """One position of a chunk: its id, the text of the id (or the textual inversion's name), its weight."""

    id: int
    text: str
    weight: float


@dataclass(frozen=True)
class CountedStage:
    """What holds up to a step: the tokens of each chunk, without BOS, EOS and padding."""

    until: int
    tokens: int
    chunks: tuple[tuple[CountedToken, ...], ...]


@dataclass(frozen=True)
class CountedPart:
    """One of the prompts that AND composes."""

    weight: float
    stages: tuple[CountedStage, ...]


@dataclass(frozen=True)
class Count:
    """The tokens of a prompt.

    Attributes:
        room: the tokens that one chunk holds.
        tokens, chunks: of the longest stage.
        until_next: how many more tokens that stage takes before it needs another chunk.
        networks: as they are written in the prompt.
    """

    dialect: str
    room: int
    tokens: int
    chunks: int
    until_next: int
    parts: tuple[CountedPart, ...]
    networks: tuple[str, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Give plain data for JSON."""
        return asdict(self)


def count(
    text: str,
    tokenizer: PromptTokenizer,
    *,
    dialect: str = "a1111",
    steps: int = 20,
    comma_backtrack: int | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Count:
    """Count the tokens of a prompt; see `parse` and `chunked` for the arguments.

    Raises:
        RequestError: an unknown dialect.
    """
    split = DIALECTS[dialect].split
    prompt = parse(text, dialect=dialect, steps=steps)

    def counted(until: int, stage: Stage) -> CountedStage:
        chunks = [
            tuple(_tokens(chunk, tokenizer, sizes or {}))
            for section in _sections(stage)
            for chunk in chunked(section, tokenizer, split=split, comma_backtrack=comma_backtrack, sizes=sizes)
        ]
        return CountedStage(until, sum(map(len, chunks)), tuple(chunks))

    parts = tuple(CountedPart(part.weight, tuple(counted(*stage) for stage in part.stages)) for part in prompt.parts)
    longest = max((stage for part in parts for stage in part.stages), key=lambda s: (len(s.chunks), s.tokens))
    room = room_of(tokenizer)
    return Count(
        prompt.dialect,
        room,
        longest.tokens,
        len(longest.chunks),
        room - len(longest.chunks[-1]),
        parts,
        tuple(f"{network.kind}:{network.name}" for network in prompt.networks),
        prompt.warnings,
    )


def _sections(stage: Stage) -> list[Section]:
    """Give all that a stage encodes; the sections of a blend one after the other."""
    found: list[Section] = []
    for entry in stage.sections:
        found += entry.sections if isinstance(entry, Blend) else [entry]
    return found


def _tokens(chunk: Chunk, tokenizer: PromptTokenizer, sizes: Mapping[str, int]) -> list[CountedToken]:
    """Give the words of a chunk; a textual inversion stands at each of its vectors."""
    names = {at + i: name for at, name in chunk.words for i in range(sizes[name])}
    return [
        CountedToken(chunk.ids[at], names.get(at) or tokenizer.decode([chunk.ids[at]]), chunk.weights[at])
        for at, piece in enumerate(chunk.pieces)
        if piece >= 0
    ]
