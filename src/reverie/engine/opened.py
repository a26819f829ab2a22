"""Adapter files that were opened for a model, remembered as long as they do not change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
KEPT = 32  # they are mapped, not read


class Opened:
    """Files by what they were opened as."""

    def __init__(self) -> None:
        self._files: dict[tuple[Any, ...], Any] = {}

    def get(self, kind: str, path: Path, open_: Callable[[Path], T]) -> T:
        """What `open_` makes of a file, made once."""
        facts = path.stat() if path.exists() else None
        key = (kind, path, facts and facts.st_size, facts and facts.st_mtime_ns)
        found: T = self._files.pop(key) if key in self._files else open_(path)
        self._files[key] = found
        while len(self._files) > KEPT:
            del self._files[next(iter(self._files))]
        return found
