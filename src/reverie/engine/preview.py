"""What a picture looks like before it is finished: latents to colours by one small linear map."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.nets.autoencoder import Autoencoder

SIZE, COUNT = 8, 8  # latents of the pictures that the map is fitted on
SMOOTHINGS = (1, 2, 4, 8)  # flat fields and fine grain alike


class LinearPreview:
    """Latents `(B, C, h, w)` -> pixels `(B, 3, h, w)` in [0, 1]: an affine map of channels, fitted to the decoder.

    The decoder is asked once about a few small random latents of several smoothnesses (1/8 of a picture of 64x64
    latents), and the map is the least squares solution on its answers; no table of constants for every model.

    Args:
        vae: the autoencoder, ready to decode.
        dtype: the precision it computes in.
    """

    @torch.no_grad()
    def __init__(self, vae: Autoencoder, dtype: torch.dtype = torch.float32) -> None:
        channels = vae.config.latent_channels
        device = next(vae.parameters()).device
        generator = torch.Generator().manual_seed(0)
        z = torch.cat([
            F.interpolate(torch.randn(COUNT // len(SMOOTHINGS), channels, SIZE // k, SIZE // k, generator=generator),
                          size=(SIZE, SIZE), mode="bilinear")
            for k in SMOOTHINGS
        ])  # fmt: skip
        pixels = vae.decode((z / vae.config.scaling_factor).to(device, dtype)).float().cpu()
        small = F.adaptive_avg_pool2d((pixels / 2 + 0.5).clamp(0, 1), (SIZE, SIZE))
        rows = torch.cat([z, torch.ones_like(z[:, :1])], 1).movedim(1, -1).reshape(-1, channels + 1)
        self.weight = torch.linalg.lstsq(rows, small.movedim(1, -1).reshape(-1, 3)).solution

    def __call__(self, x0: Tensor) -> Tensor:
        """`(B, C, h, w)` scaled latents -> `(B, 3, h, w)` in [0, 1] on the CPU."""
        z = x0.float().cpu().movedim(1, -1)
        pixels: Tensor = z @ self.weight[:-1] + self.weight[-1]
        return pixels.movedim(-1, 1).clamp(0, 1)
