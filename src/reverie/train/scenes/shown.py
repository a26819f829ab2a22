"""What an earlier stage of a model's training has shown."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from reverie.errors import ConfigError


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
            file = _File.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"data.shown: cannot read {path}: {error.strerror}") from None
        except (ValueError, ValidationError):
            raise ConfigError(
                f'data.shown: {path} is not {{"things": [[name, style], ...], "words": [...]}} in JSON'
            ) from None
        return cls(frozenset(file.things), frozenset(file.words))
