"""SHA-256 of files, read again only when they have changed."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from reverie.engine.remembered import Remembered, are_large, key_of


def hash_paths(files: Sequence[Path]) -> str:
    """SHA-256 of one file, or of the SHA-256s of several one after another, as they are now."""
    digests = [_digest(path, key_of("sha256", [path])) for path in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


@cache
def _digest(path: Path, key: str) -> str:
    """Of one file; of a large one it is kept for other processes.

    Args:
        key: changes when the file does.
    """
    if not are_large([path]):
        return _read(path)
    memory = Remembered.of_environment()
    known = memory.get(key)
    if known is None:
        known = _read(path)
        memory.note(key, known)
    return known


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
