"""Weights as some way to compute wants them (`nets/ways.py`), kept beside the network's own.

They cost as much memory again as the layers they are of; beside halves in a mapped file, which would have to be widened
anyway, as much less. A weight that is no longer used takes what was made of it with it, so that forms of a network come
and go without a trace.
"""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from reverie.checkpoint.packed import is_halved, numbers_of
from reverie.nets.ways import Ready

PATIENCE = 8  # refusals; longer than any rhythm in which parts of a network are left out (feature caching)


@dataclass
class _Pack:
    """A weight that was made ready for inputs of some shape.

    Attributes:
        of: the state of what it was made of.
        size: bytes.
        more: bytes beyond those that the weight itself would take.
        used: when it was last.
    """

    weight: Ready
    of: tuple[int, int]
    size: int
    more: int
    used: int


class Packs:
    """Ready weights, by the tensor they are made of and the shape of the inputs they are made for.

    Args:
        budget: bytes beyond those of the weights themselves; asked once, when the first is to be kept. Where they are
            used up, a weight that was wanted and refused several times takes the place of those that nobody wanted
            meanwhile.
    """

    def __init__(self, budget: Callable[[], int]) -> None:
        self._ask, self._budget, self._clock, self._lock = budget, -1, 0, threading.Lock()
        self._packs: Any = WeakTensorKeyDictionary()  # dict[Hashable, _Pack] by Tensor
        self._refused: dict[Hashable, tuple[int, int]] = {}

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(pack.size for own in self._packs.values() for pack in own.values())

    def get(self, source: Tensor, shape: Hashable, make: Callable[[], Ready], growth: float = 1.0) -> Ready | None:
        """The weight made of `source` for inputs of a shape; None where there is no room for it.

        Args:
            growth: how many times as large as `source` it will be.
        """
        with self._lock:
            self._clock += 1
            own: dict[Hashable, _Pack] = self._packs.setdefault(source, {})
            pack, state = own.get(shape), _state(source)
            if pack is None or pack.of != state:  # the weight itself was changed
                own.pop(shape, None)
                spared = source.nbytes if is_halved(source) and not own else 0
                if not self._room(int(growth * source.nbytes) - spared, (id(source), shape)):
                    return None
                weight = make()
                size = _bytes(weight)
                pack = own[shape] = _Pack(weight, state, size, size - spared, 0)
            pack.used = self._clock
            return pack.weight

    def _room(self, size: int, wanted: Hashable) -> bool:
        """Whether so many bytes are free."""
        if self._budget < 0:
            self._budget = self._ask()
        free: int = self._budget - sum(pack.more for own in self._packs.values() for pack in own.values())
        if free >= size or size <= 0:
            return True
        first, times = self._refused.get(wanted, (self._clock, 0))
        self._refused[wanted] = (first, times + 1)
        if times < PATIENCE:
            return False
        del self._refused[wanted]
        return free + self._forget(first, size - free) >= size

    def _forget(self, since: int, size: int) -> int:
        """Drop what was not used since, the oldest first, until so many bytes are free; how many there are."""
        there = [
            (pack.used, shape, own) for own in self._packs.values() for shape, pack in own.items() if pack.more > 0
        ]
        freed = 0
        for used, shape, own in sorted(there, key=lambda one: one[0]):
            if freed >= size or used >= since:
                break
            freed += own.pop(shape).more
        return freed


def _state(source: Tensor) -> tuple[int, int]:
    """What is another when a weight is changed, in place or as a whole."""
    numbers = numbers_of(source)
    return numbers.data_ptr(), 0 if numbers.is_inference() else numbers._version


def _bytes(weight: Ready) -> int:
    if isinstance(weight, tuple):
        return sum(map(_bytes, weight))
    return int(torch.ops.mkldnn._nbytes(weight)) if weight.is_mkldnn else weight.nbytes
