"""What an earlier stage of a model's training has shown, and names that no stage has used."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from reverie.errors import ConfigError
from reverie.train.scenes.sprites import Sprites, Word

UNSEEN: TypeAdapter[dict[str, list[str]]] = TypeAdapter(dict[str, list[str]])


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    things: list[tuple[str, str]]
    words: list[str]


@dataclass(frozen=True)
class Shown:
    """Nothing of this can be asked as never seen.

    Attributes:
        things: names and the styles that they were shown in.
        words: names that stood in captions.
    """

    things: frozenset[tuple[str, str]] = frozenset()
    words: frozenset[str] = frozenset()

    @classmethod
    def read(cls, path: Path) -> "Shown":
        """Of a JSON file `{"things": [[name, style], ...], "words": [...]}`.

        Raises:
            ConfigError: it cannot be read, or is not of this form.
        """
        try:
            file = _File.model_validate(_read("shown", path))
        except ValidationError:
            raise ConfigError(
                f'data.shown: {path} is not {{"things": [[name, style], ...], "words": [...]}} in JSON'
            ) from None
        return cls(frozenset(file.things), frozenset(file.words))


def read_unseen(path: Path, sprites: Sprites) -> dict[str, tuple[Word, ...]]:
    """Further names of things, which nothing is trained with: a JSON file `{name of a thing: [word, ...], ...}`.

    Raises:
        ConfigError: it cannot be read, is not of this form, or has an unknown thing or a name that is trained.
    """
    try:
        file = UNSEEN.validate_python(_read("unseen", path))
    except ValidationError:
        raise ConfigError(f"data.unseen: {path} is not {{name of a thing: [word, ...], ...}} in JSON") from None
    known = {word.text for concept in sprites.concepts.values() for word in concept.words}
    for name, words in file.items():
        if name not in sprites.concepts:
            raise ConfigError(f"data.unseen: {name!r} is not among the {len(sprites.concepts)} sprites' names")
        if taught := [word for word in words if word in known]:
            raise ConfigError(f"data.unseen: {taught[0]!r} is a name that is trained")
    return {name: tuple(Word(word, "a", None, plain=True) for word in words) for name, words in file.items()}


def also_called(sprites: Sprites, names: dict[str, tuple[Word, ...]]) -> Sprites:
    """The same sprites with further names of things."""
    known = sprites.concepts
    more = {name: replace(known[name], words=known[name].words + words) for name, words in names.items()}
    return replace(sprites, concepts=known | more)


def _read(key: str, path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"data.{key}: cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"data.{key}: {path} is not JSON") from None
