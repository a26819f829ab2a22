"""JSON files of a diffusers folder, read with types: a value of another kind is one clear error."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from reverie.errors import CheckpointError

Json: TypeAlias = Mapping[str, Any]

MOST = 1_000_000  # of anything that is counted: far above every published model, far below a build that never ends
LEVELS, LAYERS = 16, 200


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: missing, unreadable or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a diffusers folder has it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


class JsonConfig:
    """The values of one JSON object.

    Every method raises CheckpointError where a value is of another kind than it promises.

    Args:
        where: for messages, for example `unet/config.json`.
    """

    def __init__(self, values: Json, where: str) -> None:
        self._values, self._where = values, where

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._values.get(key) is not None

    def get(self, key: str, default: object = None) -> Any:
        """The value as it is."""
        return self._values.get(key, default)

    def count(self, key: str, default: int) -> int:
        """A number of channels, heads, ids: whole and positive."""
        return self._counted(key, [self.get(key, default)])[0]

    def few(self, key: str, default: int) -> int:
        """A number of modules to build."""
        count = self.count(key, default)
        if count > LAYERS:
            raise self.error(key, f"at most {LAYERS}")
        return count

    def counts(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A count for every level."""
        return self._counted(key, self.get(key, default))

    def each(self, key: str, default: int, levels: int) -> tuple[int, ...]:
        """A count for every level, written as one number where they are all the same."""
        value = self.get(key, default)
        found = self._counted(key, value if isinstance(value, list) else [value] * levels)
        if len(found) != levels:
            raise self.error(key, f"one number, or {levels}")
        return found

    def same(self, key: str, default: int, levels: int) -> int:
        """A count that all levels share, whether written once or for each of them."""
        found = set(self.each(key, default, levels))
        if len(found) != 1:
            raise self.error(key, "the same number for every level")
        return found.pop()

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(key, "a positive number")
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Finite numbers; none where the key is absent or null."""
        values = self.get(key) or ()
        if not isinstance(values, list | tuple) or not all(
            type(v) in (int, float) and math.isfinite(v) for v in values
        ):
            raise self.error(key, "a list of numbers")
        return tuple(map(float, values))

    def flag(self, key: str, default: bool = False) -> bool:
        """A truth value; the default where the key is absent or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "true or false")
        return default if value is None else value

    def names(self, key: str, default: list[str], known: tuple[str, ...]) -> list[str]:
        """The name of a block for every level."""
        values = self.get(key, default)
        if not isinstance(values, list | tuple) or not 0 < len(values) <= LEVELS:
            raise self.error(key, "the name of a block for every level")
        for value in values:
            if value not in known:
                raise CheckpointError(f"{self._where}: {key} has {value!r}; known are {' and '.join(known)}")
        return list(values)

    def one_of(self, key: str, default: str, known: tuple[str, ...]) -> str:
        """One of some words."""
        value = self.get(key, default)
        if value not in known:
            raise CheckpointError(f"{self._where}: {key} has {value!r}; known are {' and '.join(known)}")
        return str(value)

    def require(self, **expected: object) -> None:
        """Refuse values that would need a network that we do not have; an absent key is fine."""
        for key, value in expected.items():
            if self.get(key, value) != value:
                raise CheckpointError(f"{self._where}: {key} is {self.get(key)!r}; Stable Diffusion has {value!r}")

    def error(self, key: str, expected: str) -> CheckpointError:
        """The error that a value is not what was expected."""
        found = repr(self.get(key))
        return CheckpointError(f"{self._where}: {key} is {found[:80]}; expected {expected}")

    def _counted(self, key: str, values: object) -> tuple[int, ...]:
        fits = isinstance(values, list | tuple) and all(type(v) is int and 0 < v <= MOST for v in values)
        if not fits or not isinstance(values, list | tuple) or not 0 < len(values) <= LEVELS:
            raise self.error(key, f"whole numbers from 1 to {MOST:,}, for 1 to {LEVELS} levels")
        return tuple(values)
