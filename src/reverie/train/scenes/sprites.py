"""A folder of sprites: single things, cut out, each drawn in several styles, with their names.

The folder holds `sprites.npy`, `(N, size, size, 4)` uint8 RGBA, and `index.json`, which says what each row shows. It is
mapped, not read: what is drawn is read when it is drawn.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reverie.errors import ConfigError
from reverie.train.scenes.colours import Bytes, Tone

FORMAT = 1


@dataclass(frozen=True)
class Word:
    """A name of a thing.

    Attributes:
        article: "a", "the", or "" for what takes none.
        plural: None where counting makes no sense.
        plain: it names no colour, so that a colour can be put before it.
    """

    text: str
    article: str
    plural: str | None
    plain: bool


@dataclass(frozen=True)
class Concept:
    """A thing that is drawn.

    Attributes:
        words: its names; the first is the main one.
        labels: names in other languages: {locale: name}.
        natural: colours that it has by itself in some style, or in a concept of the same kind (apples are green too).
        sprites: {style: row of sprites.npy}.
    """

    name: str
    group: str
    words: tuple[Word, ...]
    labels: dict[str, str]
    natural: frozenset[str]
    sprites: dict[str, int]


@dataclass(frozen=True)
class Style:
    """A way of drawing.

    Attributes:
        ink: drawn in one ink, which can have any colour.
        adjective: its name can stand before a thing's ("a flat fox").
    """

    name: str
    ink: bool
    adjective: bool


@dataclass(frozen=True)
class Sprites:
    """The folder, opened.

    Attributes:
        concepts: by name, the best known first.
        tones: the colours of each row.
    """

    pixels: Bytes
    styles: dict[str, Style]
    concepts: dict[str, Concept]
    tones: tuple[Tone, ...]

    def pixels_of(self, concept: str, style: str) -> Bytes:
        """The drawing of a thing in a style: `(size, size, 4)`, not premultiplied."""
        pixels: Bytes = self.pixels[self.concepts[concept].sprites[style]]
        return pixels

    def tone_of(self, concept: str, style: str) -> Tone:
        """The colours of that drawing."""
        return self.tones[self.concepts[concept].sprites[style]]


def open_sprites(folder: Path) -> Sprites:
    """Open a folder of sprites.

    Raises:
        ConfigError: a file is missing or not of this form.
    """
    index, pixels = _read_index(folder / "index.json"), _map_pixels(folder / "sprites.npy")
    try:
        styles = {raw["name"]: Style(raw["name"], raw["ink"], raw["adjective"]) for raw in index["styles"]}
        concepts = {raw["name"]: _concept(raw) for raw in index["concepts"]}
        tones = tuple(Tone(tuple(raw["mean"]), tuple(raw["own"]), tuple(raw["paints"])) for raw in index["sprites"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'index.json'}: no usable {error}; build the sprites again") from None
    if len(tones) != len(pixels):
        raise ConfigError(f"{folder} has {len(pixels)} sprites but describes {len(tones)}; build the sprites again")
    return Sprites(pixels, styles, concepts, tones)


def _concept(raw: dict[str, Any]) -> Concept:
    words = tuple(Word(word["text"], word["article"], word["plural"], word["plain"]) for word in raw["words"])
    return Concept(raw["name"], raw["group"], words, raw["labels"], frozenset(raw["natural"]), raw["rows"])


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; build the sprites first") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ConfigError(f"{path} is not an index of sprites of format {FORMAT}; build the sprites again")
    return index


def _map_pixels(path: Path) -> Bytes:
    try:
        pixels: Bytes = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 4:
        raise ConfigError(f"{path} holds {pixels.dtype} {pixels.shape}; expected uint8 (N, H, W, 4)")
    return pixels
