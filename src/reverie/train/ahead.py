"""Batches prepared while others are learned: by a thread, or by processes that compose pictures."""

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

from reverie.train.data import Batch, ComposedPictures, Examples, as_pixels
from reverie.train.scenes.composition import Composition

T = TypeVar("T")

AHEAD = 3  # batches that a thread prepares while one is learned
EACH = 2  # batches that every process has before it


class Ahead(Generic[T]):
    """A function of a number, computed for the numbers to come while the last answer is used.

    Args:
        stride: from one number to the next: as many as there are devices.
        pool: who computes; one thread if None.
        depth: how many are computed at most before they are asked for.
    """

    def __init__(self, make: Callable[[int], T], stride: int, pool: Executor | None = None, depth: int = AHEAD) -> None:
        self._make, self._stride, self._depth = make, stride, depth
        self._pool = pool or ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._futures: dict[int, Future[T]] = {}

    def __call__(self, number: int) -> T:
        """The answer for `number`."""
        coming = range(number, number + (self._depth + 1) * self._stride, self._stride)
        self._futures = {n: self._futures.get(n) or self._pool.submit(self._make, n) for n in coming}
        return self._futures.pop(number).result()


def prepared(data: Examples, size: int, stride: int, workers: int = 0) -> Callable[[int], Batch]:
    """The batches of `data`, some of them computed ahead.

    Args:
        size: pictures a batch.
        workers: processes that compose pictures; one thread of this process if 0, or if the pictures are ready.
    """
    if not workers or not isinstance(data, ComposedPictures):
        return Ahead(lambda number: data.batch(number, size), stride)
    unstopped = (signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the process that trains
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), signal.signal, unstopped)
    composed = Ahead(Composition(data.scenes.config, data.scenes.seed, size), stride, pool, EACH * workers)

    def batch(number: int) -> Batch:
        pictures, captions = composed(number)
        return as_pixels(torch.from_numpy(pictures)), captions

    return batch
