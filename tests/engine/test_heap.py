"""The heap keeps what layers free while a picture is drawn, and is trimmed afterwards."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from reverie.engine import heap
from reverie.engine.heap import KEEPING, USUAL, kept_heap

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")


class Library:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def mallopt(self, option: int, value: int) -> int:
        self.told.append((option, value))
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.told.append("trimmed")
        return 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(heap, "_library", lambda: made)
    return made


@pytest.fixture
def fresh() -> Iterator[None]:
    heap._library.cache_clear()
    yield
    heap._library.cache_clear()


def test_it_is_set_once_and_set_back_after_the_last(library: Library) -> None:
    with pytest.raises(ZeroDivisionError), kept_heap():
        with kept_heap():
            assert library.told == list(KEEPING.items())
        assert "trimmed" not in library.told
        _ = 1 / 0
    assert library.told == [*KEEPING.items(), *USUAL.items(), "trimmed"]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_"])
def test_the_users_own_settings_are_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert heap._library() is None
    with kept_heap():
        pass


@pytest.mark.usefixtures("fresh")
def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert heap._library() is None


@GLIBC
def test_blocks_are_used_again_and_given_back() -> None:
    """In a process of its own: page faults while large blocks come and go, and the memory that is left."""
    code = """
import resource
import torch
from reverie.engine.heap import kept_heap
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
usual = faults()
before = resident()
with kept_heap():
    faults()
    kept = faults()
    inside = resident()
print(usual, kept, before, inside, resident())
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=clean)
    usual, kept, before, inside, after = map(int, done.stdout.split())
    assert kept < usual / 20
    assert inside > before + (48 << 20) and after < before + (16 << 20)
