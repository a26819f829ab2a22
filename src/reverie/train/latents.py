"""What a diffusion model learns from: latents with captions, cached or made on the fly; batch k is a function of k."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from reverie.nets.autoencoder import Autoencoder
from reverie.train.data import Examples, PictureSet

T = TypeVar("T")

AHEAD = 3  # batches that are prepared while one is learned
ENCODED = 64  # pictures encoded at once


class LatentSource(Protocol):
    """Batches of scaled latents."""

    def batch(self, number: int) -> tuple[Tensor, list[str]]:
        """Latents `(B, C, h, w)` float32 on the CPU or the device, and their captions."""
        ...


class CachedLatents:
    """The means of all latents of a set of pictures, encoded once."""

    def __init__(self, data: PictureSet, vae: Autoencoder, device: torch.device, size: int) -> None:
        self.data, self.size = data, size
        rows = range(0, len(data), ENCODED)
        parts = (data.pixels(list(range(start, min(start + ENCODED, len(data))))) for start in rows)
        self.latents = torch.cat([encoded(vae, part.to(device)).cpu() for part in parts])

    def batch(self, number: int) -> tuple[Tensor, list[str]]:
        """See `LatentSource`."""
        rows, captions = self.data.chosen(number, self.size)
        return self.latents[rows], captions


class LiveLatents:
    """Pictures composed anew for every batch, some batches ahead, and encoded on the device."""

    def __init__(self, data: Examples, vae: Autoencoder, device: torch.device, size: int, stride: int = 1) -> None:
        self.vae, self.device = vae, device
        self._prepared = Ahead(lambda number: data.batch(number, size), stride)

    def batch(self, number: int) -> tuple[Tensor, list[str]]:
        """See `LatentSource`."""
        pixels, captions = self._prepared(number)
        return encoded(self.vae, pixels.to(self.device)), captions


def latent_source(data: Examples, vae: Autoencoder, device: torch.device, size: int, stride: int = 1) -> LatentSource:
    """Of a set of pictures, encoded once; of pictures that are composed, as they come.

    Args:
        size: pictures a batch.
        stride: from one batch of this device to the next.
    """
    if isinstance(data, PictureSet):
        return CachedLatents(data, vae, device, size)
    return LiveLatents(data, vae, device, size, stride)


@torch.no_grad()
def encoded(vae: Autoencoder, pixels: Tensor) -> Tensor:
    """The means of the latents of pixels in [-1, 1], scaled."""
    return vae.config.scaled(vae.encode(pixels)[0])


class Ahead(Generic[T]):
    """A function of a number, computed for the numbers to come while the last answer is used.

    Args:
        stride: from one number to the next: as many as there are devices.
    """

    def __init__(self, make: Callable[[int], T], stride: int) -> None:
        self._make, self._stride = make, stride
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._futures: dict[int, Future[T]] = {}

    def __call__(self, number: int) -> T:
        """The answer for `number`."""
        wanted = self._futures.pop(number, None)
        answer = self._make(number) if wanted is None else wanted.result()
        following = range(number + self._stride, number + (AHEAD + 1) * self._stride, self._stride)
        self._futures = {n: self._futures.get(n) or self._pool.submit(self._make, n) for n in following}
        return answer
