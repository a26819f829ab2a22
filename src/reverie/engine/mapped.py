"""Weights that are views of mapped files: which they are, and what the system's cache is told about them.

Pages of a mapped file are read when they are touched, and the system takes them back when it needs memory. They are
the cache's, not the program's; but a limit that a user sets is kept for them, too: what is not needed is let go.
"""

import bisect
import ctypes
import mmap
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from reverie.checkpoint.packed import numbers_of

MAPS = Path("/proc/self/maps")


class MappedFiles:
    """The mapped files of this process as they are when it is made. Knows nothing where the system is not Linux."""

    def __init__(self) -> None:
        self._regions = sorted(_regions())
        self._starts = [start for start, _ in self._regions]

    def holds(self, tensor: Tensor) -> bool:
        """Whether the numbers of a tensor are in a mapped file."""
        return self._span(tensor) is not None

    def wanted(self, tensors: Iterable[Tensor]) -> None:
        """They will be read soon: the system may begin now."""
        self._told(tensors, "MADV_WILLNEED", outward=True)

    def unwanted(self, tensors: Iterable[Tensor]) -> None:
        """They will not be read soon: their pages may be taken. They are read again from the file when touched.

        Nothing may have been written to them: it would be lost.
        """
        self._told(tensors, "MADV_DONTNEED", outward=False)

    def _told(self, tensors: Iterable[Tensor], advice: str, *, outward: bool) -> None:
        page, number = mmap.PAGESIZE, getattr(mmap, advice, None)
        for tensor in tensors:
            span = self._span(tensor)
            if span is None or number is None:
                continue
            # a page at the edge belongs to the neighbour, too: wanted with it, not let go with it
            first, last = (span[0], span[1] + page - 1) if outward else (span[0] + page - 1, span[1])
            start, length = first // page * page, last // page * page - first // page * page
            if length > 0:
                _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), number)

    def _span(self, tensor: Tensor) -> tuple[int, int] | None:
        """Addresses of a tensor's numbers, if they lie in a mapped file whole."""
        data = numbers_of(tensor)
        if data.device.type != "cpu" or not data.numel():
            return None
        storage = data.untyped_storage()
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        i = bisect.bisect_right(self._starts, start) - 1
        return (start, end) if i >= 0 and end <= self._regions[i][1] else None


def _regions() -> Iterable[tuple[int, int]]:
    """First and last address of every mapping of a file."""
    if sys.platform != "linux":
        return
    for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        span, _, _, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and path:
            start, end = (int(address, 16) for address in span.split("-"))
            yield start, end


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
