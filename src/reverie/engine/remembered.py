"""What is known of files that have not changed since: hashes that take seconds, weights that were seen to be sound.

One JSON file in the user's cache, shared by every process. What cannot be read or written is only slower.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from reverie.checkpoint.save import write_json
from reverie.errors import OutputError
from reverie.places import user_cache

LARGE = 1 << 26  # bytes; smaller files are read again, which takes less than this


class Remembered:
    """Texts by keys.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, str] | None = None

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] | None = None) -> "Remembered":
        """In `reverie/files.json` of the user's cache."""
        return cls(user_cache(environment) / "reverie" / "files.json")

    def get(self, key: str) -> str | None:
        """What was noted, by this process or an earlier one."""
        if self._known is None:
            self._known = self._read()
        return self._known.get(key)

    def note(self, key: str, value: str) -> None:
        """Keep a text; what other processes have noted meanwhile stays."""
        self._known = self._read() | {key: value}
        with suppress(OSError, OutputError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self._known)

    def _read(self) -> dict[str, str]:
        with suppress(OSError, ValueError, AttributeError):
            return {str(key): str(value) for key, value in json.loads(self.path.read_text("utf-8")).items()}
        return {}


def key_of(what: str, files: Iterable[Path]) -> str:
    """A key that holds as long as path, size and time of the files do."""
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return "|".join([what, *(f"{path}:{size}:{time}" for path, size, time in facts)])


def are_large(files: Iterable[Path]) -> bool:
    """Whether reading the files takes so long that what comes of it is worth keeping."""
    return sum(path.stat().st_size for path in files) >= LARGE
