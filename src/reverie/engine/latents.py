"""Between pictures and latents, and the sizes that a network allows."""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.engine.canvas import resized
from reverie.errors import RequestError
from reverie.families.base import Parts
from reverie.nets.autoencoder import Autoencoder
from reverie.nets.tiling import decode_tiled, encode_tiled
from reverie.sampling.presets import Preset
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


def start(noise: Tensor, sigma: float, process: AnyProcess, preset: Preset, sampler: Sampler, base: str) -> Tensor:
    """The first sample, from standard normal noise.

    Programs differ (`Preset.start`): diffusers starts its sigma-based samplers from `sigma * noise` for linspace and
    trailing, and everything else so that the DDPM sample has variance 1; ComfyUI does the latter from the model's
    largest sigma alone; AUTOMATIC1111 always takes `sigma * noise`.
    """
    if preset.start == "class":
        from_sigma = process.discrete and not sampler.unit_start and base in {"linspace", "trailing"}
    else:
        from_sigma = preset.start == "sigma" or sigma < process.sigma_max * (1 - 1e-6)
    return noise * (sigma if from_sigma else process.scale(sigma))


def end(x: Tensor, sigma: float, process: AnyProcess, sampler: Sampler) -> Tensor:
    """The latents of the last sample, which may have a little noise left.

    diffusers' DDPM-like classes hand over x_t, its sigma-based ones x.
    """
    return x / process.scale(sigma) if sampler.unit_start and process.discrete else x


@torch.no_grad()
def decode(vae: Autoencoder, latents: Tensor, dtype: torch.dtype, tile: int = 0) -> Tensor:
    """Scaled latents `(B, C, h, w)` -> pixels `(B, 3, H, W)` float32 in [0, 1].

    Args:
        tile: decode in tiles of so many latents; 0 in one piece.
    """
    z = vae.config.unscaled(latents).to(dtype)
    small = tile == 0 or max(z.shape[-2:]) <= tile
    decoded = vae.decode(z) if small else decode_tiled(vae, z, tile)
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode(vae: Autoencoder, pixels: Tensor, dtype: torch.dtype, tile: int = 0) -> tuple[Tensor, Tensor]:
    """Pixels `(B, 3, H, W)` in [0, 1] -> mean and standard deviation of their latents, not scaled, float32."""
    pictures = (2 * pixels - 1).to(dtype)
    small = tile == 0 or max(pixels.shape[-2:]) <= tile * vae.config.factor
    mean, log_variance = vae.encode(pictures) if small else encode_tiled(vae, pictures, tile)
    return mean.float(), (log_variance.float() / 2).exp()


def mask_latents(mask: Tensor, factor: int, preset: Preset) -> Tensor:
    """A mask of pixels `(1, 1, H, W)` as one of latents: a latent is drawn if any of its pixels is.

    diffusers looks at one pixel of each latent, which can lose the rim of a mask; its preset does the same.
    """
    if preset.name == "diffusers":
        size = (mask.shape[-2] // factor, mask.shape[-1] // factor)
        return F.interpolate(mask, size=size)
    return F.max_pool2d(mask, factor)


# How latents are enlarged between two passes: AUTOMATIC1111's names, mode and whether it is antialiased.
LATENT_UPSCALERS: dict[str, tuple[str, bool]] = {
    "latent": ("bilinear", False), "latent_antialiased": ("bilinear", True), "latent_bicubic": ("bicubic", False),
    "latent_bicubic_antialiased": ("bicubic", True), "latent_nearest": ("nearest", False),
    "latent_nearest_exact": ("nearest-exact", False),
}  # fmt: skip
PIXEL_UPSCALERS = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}


def resized_pixels(pixels: Tensor, size: tuple[int, int], name: str) -> Tensor:
    """Pixels `(B, 3, H, W)` at a width and height, by the filter `name`, or Lanczos' after a network enlarged them."""
    return resized(pixels, size, PIXEL_UPSCALERS.get(name, Image.Resampling.LANCZOS)).to(pixels.device)
