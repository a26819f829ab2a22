"""SHA-256 of files, read again only when they have changed."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path


def hash_paths(files: Sequence[Path]) -> str:
    """SHA-256 of files as they are now; read again only when size or time have changed."""
    return hash_files(tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files))


@cache
def hash_files(files: tuple[tuple[str, int, int], ...]) -> str:
    """SHA-256 of one file, or of the SHA-256s of several one after another; `files` are (path, size, mtime)."""
    digests = []
    for path, _, _ in files:
        with Path(path).open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(d.digest() for d in digests)).hexdigest()
