"""A folder of wildcards: the lines of NAME.txt, by name or glob, and nothing from outside the folder."""

import difflib
import os
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from reverie.errors import RequestError
from reverie.text.pieces import excerpt

ENDING = ".txt"
LARGEST = 16 * 1024 * 1024  # bytes of one file
_GLOB = frozenset("*?[")


class Wildcards:
    """The wildcards of a folder. Each file is read once: make a new one for each request, so that edits count.

    Args:
        folder: where the names begin: `animals/birds` is `animals/birds.txt` in it. None: there are no wildcards.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._read: dict[str, list[str]] = {}

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Find the files by name, in the order of code points, which is the same on every system."""
        found: dict[str, Path] = {}
        for here, _, files in os.walk(self.folder) if self.folder else ():  # links to folders are not followed
            for path in (Path(here, file) for file in sorted(files)):
                if path.suffix.lower() == ENDING and path.is_file():  # not a pipe, which would be waited for
                    found.setdefault(path.relative_to(self.folder or here).with_suffix("").as_posix(), path)
        return dict(sorted(found.items()))

    @property
    def names(self) -> list[str]:
        """All names, sorted by code point."""
        return list(self._files)

    def lines(self, name: str) -> list[str]:
        """Give the lines of a wildcard, or of all that a glob matches, in the order of the names, each text once.

        `*`, `?` and `[...]` match within one folder, `**` any folders. Blank lines and lines that begin with `#` are
        left out, space at the ends is taken off.

        Raises:
            RequestError: no such wildcard, one without lines, a name that leads out of the folder, a file that is too
                large or no UTF-8.
        """
        if name not in self._read:
            self._read[name] = self._found(name)
        return self._read[name]

    def _found(self, name: str) -> list[str]:
        if self.folder is None:
            raise RequestError(
                f"the prompt asks for wildcard {excerpt(name)}, but no folder of wildcards was given; "
                "write \\__ for underscores that are text"
            )
        if not self.folder.is_dir():
            raise RequestError(f"the folder of wildcards {self.folder} does not exist")
        parts = name.split("/")
        if any(part in {"", ".", ".."} for part in parts) or any(mark in name for mark in ("\\", ":", "\0")):
            raise RequestError(f"wildcard {excerpt(name)} is not a name within the folder of wildcards")
        if _GLOB & set(name):
            matching = [path for known, path in self._files.items() if _matches(known.split("/"), parts)]
        else:
            matching = [self._files[name]] if name in self._files else []
        if not matching:
            raise RequestError(f"unknown wildcard {excerpt(name)}; {self._hint(name)}")
        lines = list(dict.fromkeys(line for path in matching for line in _lines(path, self.folder)))
        if not lines:
            raise RequestError(f"wildcard {excerpt(name)} has no lines: its file is empty or all comments")
        return lines

    def _hint(self, name: str) -> str:
        """Name the nearest wildcard: by its whole name or by its file's."""
        if not self.names:
            return f"there is no {ENDING} file in {self.folder}"
        by_file = {known.rpartition("/")[2]: known for known in reversed(self.names)}
        near = difflib.get_close_matches(name, [*self.names, *by_file], n=1, cutoff=0.5)
        if near:
            return f"did you mean {by_file.get(near[0], near[0])!r}?"
        few = ", ".join(self.names[:10])
        return f"known: {few}" + (f" and {len(self.names) - 10} more" if len(self.names) > 10 else "")


def _lines(path: Path, folder: Path) -> list[str]:
    """Read one file."""
    try:
        if not path.resolve(strict=True).is_relative_to(folder.resolve()):
            raise RequestError(f"{path} is a link out of the folder of wildcards: put the file itself there")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise RequestError(f"{path} is larger than {LARGEST >> 20} MiB, the limit for a file of wildcards")
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"{path} is not text in UTF-8: save it as UTF-8") from None
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def _matches(name: list[str], glob: list[str]) -> bool:
    """Match the parts of a path; `**` stands for any number of them."""
    reached = {0}  # how many parts of the glob may be used up
    for part in name:
        reached = _skipped(reached, glob)
        reached = {
            i + (glob[i] != "**") for i in reached if i < len(glob) and (glob[i] == "**" or fnmatchcase(part, glob[i]))
        }
    return len(glob) in _skipped(reached, glob)


def _skipped(reached: set[int], glob: list[str]) -> set[int]:
    """Add the places behind each `**`, which may stand for nothing."""
    found = set(reached)
    for i, part in enumerate(glob):
        if i in found and part == "**":
            found.add(i + 1)
    return found
