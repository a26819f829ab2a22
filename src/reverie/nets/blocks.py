"""Blocks that the U-Net and the autoencoder share."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Cosines then sines of the timestep at geometric frequencies (DDPM; order as Stable Diffusion has it).

    Args:
        timesteps: `(B,)`, may be fractional.
        width: even number of channels.

    Returns:
        `(B, width)` float32.
    """
    half = width // 2
    frequencies = torch.exp(
        -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_embedding(scales: Tensor, width: int) -> Tensor:
    """Sines then cosines of `1000 * (scale - 1)`: what a distilled network is told of the guidance scale.

    Source: Meng et al. 2023; diffusers' `get_guidance_scale_embedding`, whose last frequency is 1/10000.

    Args:
        scales: `(B,)`, guidance scales; 1 is no guidance.
        width: even number of channels, at least 4.

    Returns:
        `(B, width)` float32.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=scales.device)
    angles = 1000 * (scales.float() - 1)[:, None] * torch.exp(-math.log(10000.0) / (half - 1) * steps)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between them.

    Args:
        condition_width: channels of a second input that is projected and added to the first; 0 for none.
    """

    def __init__(self, width: int, inner: int, condition_width: int = 0) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, inner)
        self.cond_proj = nn.Linear(condition_width, width, bias=False) if condition_width else None
        self.linear_2 = nn.Linear(inner, inner)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """`x (B, width)`, `condition (B, condition_width)` -> `(B, inner)`."""
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition)
        result: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return result


def plus(layer: nn.Module, x: Tensor, to: Tensor) -> Tensor:
    """`to + layer(x)`; in one pass, and rounded once, where the layer can do that (`nets/ways.py`)."""
    summed: Callable[[Tensor, Tensor], Tensor] | None = getattr(layer, "summed", None)
    if summed is not None:
        return summed(x, to)
    result: Tensor = to + layer(x)
    return result


def activated(norm: nn.Module, x: Tensor) -> Tensor:
    """SiLU of the normed; in the norm's own memory where no gradient has to come back through it."""
    y: Tensor = norm(x)
    return F.silu(y, inplace=not y.requires_grad)


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, plus the input (He et al. 2016; BigGAN-style as in DDPM).

    Args:
        source, width: channels in and out; a 1x1 `conv_shortcut` joins them where they differ.
        time_width: channels of the time embedding; None in the autoencoder, which has no time.
        groups, eps: of the group norms.
    """

    def __init__(
        self, source: int, width: int, *, time_width: int | None = None, groups: int = 32, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, source, eps=eps)
        self.conv1 = nn.Conv2d(source, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, width) if time_width else None
        self.norm2 = nn.GroupNorm(groups, width, eps=eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(source, width, 1) if source != width else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """`x (B, source, h, w)`, `time (B, time_width)` -> `(B, width, h, w)`."""
        y = self.conv1(activated(self.norm1, x))
        if self.time_emb_proj is not None and time is not None:
            y = y + self.time_emb_proj(F.silu(time))[:, :, None, None]
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return plus(self.conv2, activated(self.norm2, y), shortcut)


class Downsample(nn.Module):
    """A strided convolution that halves height and width.

    Args:
        asymmetric: pad right and below only, as the autoencoder does; else one pixel all round.
    """

    def __init__(self, width: int, *, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, width, h, w)` -> `(B, width, ceil(h/2), ceil(w/2))` (floor where asymmetric)."""
        result: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
        return result


class Upsample(nn.Module):
    """Nearest-neighbour enlargement followed by a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """`(B, width, h, w)` -> `(B, width, 2h, 2w)`, or `size` where an odd size was halved on the way down."""
        if size is None:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            x = F.interpolate(x, size=size, mode="nearest")
        result: Tensor = self.conv(x)
        return result
