"""Named things with aliases, looked up forgivingly and refused helpfully."""

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

from reverie.errors import RequestError

T = TypeVar("T")


def normalise(name: str) -> str:
    """`"DPM++ 2M "` and `"dpm++_2m"` are one name: lower case, with `_` for runs of spaces, dashes and underscores."""
    return "_".join(name.lower().replace("-", " ").replace("_", " ").split())


class Registry(Generic[T]):
    """A table from names and aliases to entries of one kind (samplers, spacings, families).

    Args:
        kind: the word for an entry in error messages, for example `"sampler"`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._names: dict[str, str] = {}
        self._spelled: dict[str, str] = {}

    def add(self, name: str, entry: T, aliases: tuple[str, ...] = ()) -> None:
        """Register `entry`; a name or alias that is already taken by another entry is a programming error."""
        for alias in (name, *aliases):
            if self._names.setdefault(normalise(alias), name) != name:
                raise ValueError(f"{self.kind} name {alias!r} is taken by {self._names[normalise(alias)]!r}")
            self._spelled.setdefault(normalise(alias), alias)
        self._entries[name] = entry

    def name(self, alias: str) -> str:
        """The canonical name behind any alias.

        Raises:
            RequestError: no entry has that name; the message suggests the nearest one.
        """
        found = self._names.get(normalise(alias))
        if found is None:
            raise RequestError(f"unknown {self.kind} {alias!r}; {self._hint(alias)}")
        return found

    def __getitem__(self, alias: str) -> T:
        return self._entries[self.name(alias)]

    def __contains__(self, alias: object) -> bool:
        return isinstance(alias, str) and normalise(alias) in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def aliases(self, name: str) -> list[str]:
        """All other names of the entry `name` as they were registered, sorted."""
        others = (alias for alias, owner in self._names.items() if owner == name and alias != normalise(name))
        return sorted((self._spelled[alias] for alias in others), key=str.lower)

    def _hint(self, alias: str) -> str:
        near = difflib.get_close_matches(normalise(alias), self._names, n=1, cutoff=0.5)
        known = ", ".join(self._entries)
        return f"did you mean {self._names[near[0]]!r}? Known: {known}" if near else f"known: {known}"
