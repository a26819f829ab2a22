"""The C library's heap while networks compute on a CPU: what one layer gives back, the next one gets.

glibc maps every large block anew and gives it back to the system at once; the pages are then found and cleared for each
layer, a tenth of a step of SD 1.5. While a picture is drawn such blocks come from the heap instead, which is trimmed
afterwards. Other C libraries are left alone, and so is a heap that the user has settings for.
"""

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# mallopt(3)
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4
KEEPING = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 << 20}
# glibc adjusts its limits itself until one is set; these are what that comes to where large blocks were freed.
USUAL = {MMAP_MAX: 65536, TRIM_THRESHOLD: 64 << 20, TOP_PAD: 128 << 10, MMAP_THRESHOLD: 32 << 20}
_lock, _users = threading.Lock(), [0]


@cache
def _library() -> Any:
    """The C library; None where it is not glibc, or told by the user how to behave."""
    told = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if told or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)


@contextmanager
def kept_heap() -> Iterator[None]:
    """Keep freed memory for the next layer; give it to the system at the end. For threads side by side, too."""
    if _library() is None:
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    with _lock:
        _users[0] += 1
        if _users[0] == 1:
            _set(KEEPING)


def _leave() -> None:
    with _lock:
        _users[0] -= 1
        if _users[0] == 0:
            _set(USUAL)
            _library().malloc_trim(0)


def _set(options: dict[int, int]) -> None:
    for option, value in options.items():
        _library().mallopt(option, value)
