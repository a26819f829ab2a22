"""What a picture looks like before it is finished: by one small linear map, or by a tiny decoder where there is one."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.checkpoint.load import build
from reverie.checkpoint.source import open_weights
from reverie.errors import RequestError
from reverie.nets.autoencoder import Autoencoder
from reverie.nets.taesd import TinyDecoder, config_from_shapes, renumbered

SIZE, COUNT, PATCHES = (
    8,
    16,
    6,
)  # latents of a side of the pictures that the map is fitted on; pictures; patches in each


class LinearPreview:
    """Latents `(B, C, h, w)` -> pixels `(B, 3, h, w)` in [0, 1]: an affine map of channels, fitted to the autoencoder.

    Pictures of flat coloured patches are encoded once (a quarter of the pixels of a picture of 64x64 latents), and the
    map is the least squares solution from their latents to their colours; no table of constants for every model.

    Args:
        vae: the autoencoder, ready.
        dtype: the precision it computes in.
    """

    @torch.no_grad()
    def __init__(self, vae: Autoencoder, dtype: torch.dtype = torch.float32) -> None:
        pictures = _patchwork(SIZE * vae.config.factor)
        device = next(vae.parameters()).device
        mean, _ = vae.encode((2 * pictures - 1).to(device, dtype))
        z = vae.config.scaled(mean.float().cpu())
        small = F.adaptive_avg_pool2d(pictures, (SIZE, SIZE))
        rows = torch.cat([z, torch.ones_like(z[:, :1])], 1).movedim(1, -1).flatten(0, 2)
        self.weight = torch.linalg.lstsq(rows, small.movedim(1, -1).flatten(0, 2)).solution

    def __call__(self, x0: Tensor) -> Tensor:
        """`(B, C, h, w)` scaled latents -> `(B, 3, h, w)` in [0, 1] on the CPU."""
        z = x0.float().cpu().movedim(1, -1)
        pixels: Tensor = z @ self.weight[:-1] + self.weight[-1]
        return pixels.movedim(-1, 1).clamp(0, 1)


def _patchwork(side: int) -> Tensor:
    """`(COUNT, 3, side, side)` in [0, 1]: rectangles of random colours, half of the grounds white."""
    generator = torch.Generator().manual_seed(0)
    grounds = torch.rand(COUNT, 3, 1, 1, generator=generator)
    grounds[::2] = 1
    pictures = grounds.repeat(1, 1, side, side)
    for picture in pictures:
        for _ in range(PATCHES):
            (top, left), (height, width) = (torch.rand(2, 2, generator=generator) * side / 1.5).int().tolist()
            colour = torch.rand(3, 1, 1, generator=generator)
            picture[:, top : top + height + 1, left : left + width + 1] = colour
    return pictures


class TinyPreview:
    """Latents `(B, C, h, w)` -> pixels `(B, 3, 8h, 8w)` in [0, 1] by a tiny decoder (TAESD) from a file.

    Args:
        path: `taesd_decoder.safetensors` and its like, or `diffusion_pytorch_model.safetensors` of a diffusers folder.
        channels: of the model's latents.

    Raises:
        CheckpointError: not a tiny decoder, or broken.
        RequestError: not there, or for latents of another family.
    """

    def __init__(self, path: Path, channels: int, device: torch.device | str = "cpu") -> None:
        if not path.is_file():
            raise RequestError(f"no tiny decoder at {path}; give a file such as taesd_decoder.safetensors")
        file = open_weights(path)
        tensors = {name: file.tensor(name).float() for name in file.tensors if not name.startswith("encoder.")}
        inside = {n.removeprefix("decoder."): t for n, t in tensors.items() if n.startswith("decoder.")}
        named = inside or renumbered(tensors, "decoder")
        config = config_from_shapes({name: tuple(t.shape) for name, t in named.items()}, "decoder")
        if config.latent_channels != channels:
            raise RequestError(
                f"{path} decodes latents of {config.latent_channels} channels; this model's have {channels}"
            )
        self.decoder = build(lambda: TinyDecoder(config), named, f"the tiny decoder {path}").to(device)

    @torch.no_grad()
    def __call__(self, x0: Tensor) -> Tensor:
        """`(B, C, h, w)` scaled latents -> `(B, 3, 8h, 8w)` in [0, 1] on the CPU."""
        pixels: Tensor = self.decoder(x0.float())
        return (pixels.float().cpu() / 2 + 0.5).clamp(0, 1)
