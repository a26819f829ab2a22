"""The compact upscaler of Real-ESRGAN: pictures four times as large (Wang et al. 2021, `SRVGGNetCompact`).

All convolutions run at the small size; the last one gives the 16 pixels of every small pixel at once.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class UpscalerConfig:
    """The shape of an upscaler. The defaults are the published `realesr-animevideov3` (621,424 parameters).

    Attributes:
        features: channels between the convolutions.
        convolutions: how many 3 x 3 convolutions stand between the first and the last.
        scale: pixels out a pixel in, along each side.
    """

    in_channels: int = 3
    out_channels: int = 3
    features: int = 64
    convolutions: int = 16
    scale: int = 4


class CompactUpscaler(nn.Module):
    """Convolutions and PReLUs that draw the detail; the picture itself is repeated underneath."""

    def __init__(self, config: UpscalerConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or UpscalerConfig()
        if config.in_channels != config.out_channels:
            raise ValueError(f"The picture is added to its detail, so {config} needs as many channels out as in.")
        # One flat list, as the published names count: convolutions at even places, PReLUs at odd ones.
        widths = [config.in_channels, *[config.features] * (config.convolutions + 1)]
        self.body = nn.ModuleList()
        for before, after in pairwise(widths):
            self.body.extend([nn.Conv2d(before, after, 3, padding=1), nn.PReLU(after)])
        self.body.append(nn.Conv2d(config.features, config.out_channels * config.scale**2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, 3, H, W)`, RGB in [0, 1] -> `(B, 3, 4H, 4W)`, around [0, 1]: the caller clamps.

        The published weights sharpen edges and move flat saturated colours by a few hundredths.
        """
        y = x
        for layer in self.body:
            y = layer(y)
        detail = F.pixel_shuffle(y, self.config.scale)
        return detail + F.interpolate(x, scale_factor=float(self.config.scale), mode="nearest")
