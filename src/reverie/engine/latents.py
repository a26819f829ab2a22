"""Between pictures and latents, and the sizes that a network allows."""

import torch
from torch import Tensor

from reverie.diffusion.process import Process
from reverie.errors import RequestError
from reverie.families.base import Parts
from reverie.nets.autoencoder import Autoencoder
from reverie.sampling.registry import Sampler


def check_size(parts: Parts, width: int, height: int) -> None:
    """Width and height must be whole latents.

    Raises:
        RequestError: with the nearest size that works.
    """
    factor = parts.vae.config.factor
    for name, size in (("width", width), ("height", height)):
        if size % factor or size < factor:
            nearest = max(round(size / factor), 1) * factor
            raise RequestError(f"{name} is {size}; it must be a multiple of {factor}, the nearest is {nearest}")


def start(noise: Tensor, sigma: float, process: Process, sampler: Sampler, spacing: str, base: str) -> Tensor:
    """The first sample, from standard normal noise.

    diffusers starts its sigma-based samplers from `sigma * noise` for linspace and trailing, and everything else so
    that the DDPM sample has variance 1.
    """
    from_sigma = not sampler.unit_start and base in {"linspace", "trailing"}
    return noise * (sigma if from_sigma else process.scale(sigma))


@torch.no_grad()
def decode(vae: Autoencoder, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Scaled latents `(B, C, h, w)` -> pixels `(B, 3, H, W)` float32 in [0, 1]."""
    z = (latents / vae.config.scaling_factor).to(dtype)
    return (vae.decode(z).float() / 2 + 0.5).clamp(0, 1)
