"""What a diffusion model learns from: latents with captions, cached or made on the fly; batch k is a function of k."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from reverie.nets.autoencoder import Autoencoder
from reverie.train.ahead import prepared
from reverie.train.data import Batch, Examples, PictureSet

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
    """Pictures composed anew for every batch, and encoded on the device."""

    def __init__(self, batches: Callable[[int], Batch], vae: Autoencoder, device: torch.device) -> None:
        self.batches, self.vae, self.device = batches, vae, device

    def batch(self, number: int) -> tuple[Tensor, list[str]]:
        """See `LatentSource`."""
        pixels, captions = self.batches(number)
        return encoded(self.vae, pixels.to(self.device)), captions


def latent_source(
    data: Examples, vae: Autoencoder, device: torch.device, size: int, stride: int = 1, workers: int = 0
) -> LatentSource:
    """Of a set of pictures, encoded once; of pictures that are composed, as they come.

    Args:
        size: pictures a batch.
        stride: from one batch of this device to the next.
        workers: processes that compose; see `prepared`.
    """
    if isinstance(data, PictureSet):
        return CachedLatents(data, vae, device, size)
    return LiveLatents(prepared(data, size, stride, workers), vae, device)


@torch.no_grad()
def encoded(vae: Autoencoder, pixels: Tensor) -> Tensor:
    """The means of the latents of pixels in [-1, 1], scaled."""
    return vae.config.scaled(vae.encode(pixels)[0])
