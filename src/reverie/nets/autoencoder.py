"""The KL autoencoder between pictures and latents (Rombach et al. 2022, section 3.1)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reverie.nets.attention import Attention
from reverie.nets.blocks import Downsample, ResnetBlock, Upsample, activated

NORM_EPS = 1e-6  # CompVis `Normalize`


@dataclass(frozen=True)
class AutoencoderConfig:
    """The shape of an autoencoder. The defaults are Stable Diffusion 1.5.

    Attributes:
        block_out_channels: width of each level; each after the first halves the resolution.
        scaling_factor: latents are multiplied by it for the U-Net (0.18215: CompVis v1 config).
        shift_factor: subtracted from latents before they are multiplied (0: they are not shifted).
        latents_mean, latents_std: of each latent channel, by which latents are standardised before they are
            multiplied (Playground 2.5); empty where they are not.
        quant_conv: whether a 1x1 convolution follows the encoder.
        post_quant_conv: whether a 1x1 convolution precedes the decoder.
    """

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    quant_conv: bool = True
    post_quant_conv: bool = True
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    @property
    def factor(self) -> int:
        """Pixels a latent, along each side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def scaled(self, z: Tensor) -> Tensor:
        """The autoencoder's latents `(B, C, h, w)` as the denoising network sees them."""
        mean, std = self._statistics(z)
        return (z - mean) / std * self.scaling_factor

    def unscaled(self, latents: Tensor) -> Tensor:
        """The denoising network's latents `(B, C, h, w)` as the decoder wants them."""
        mean, std = self._statistics(latents)
        return latents / self.scaling_factor * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean and standard deviation of each channel, `(C, 1, 1)`; the shift and 1 where the config has none."""
        if not self.latents_mean:
            return self.shift_factor, 1.0
        mean, std = (like.new_tensor(values)[:, None, None] for values in (self.latents_mean, self.latents_std))
        return mean, std


# Stable Diffusion 3 and 3.5: sd3-ref `SD3LatentFormat`, `SDVAE`.
SD3_AUTOENCODER = AutoencoderConfig(
    latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, quant_conv=False, post_quant_conv=False
)


class PixelAttention(Attention):
    """Single-head self-attention over the pixels of a feature map, added to it."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__(width, 1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, width, eps=NORM_EPS)

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """`(B, width, h, w)` -> `(B, width, h, w)`."""
        y = self.group_norm(x).flatten(2).transpose(1, 2)
        y = super().forward(y, *others, **named)
        return x + y.transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups=groups) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(width, groups)])

    def forward(self, x: Tensor) -> Tensor:
        """`(B, width, h, w)` -> `(B, width, h, w)`."""
        result: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x)))
        return result


class Level(nn.Module):
    """Residual blocks of one resolution, then a change of resolution (`downsamplers` or `upsamplers`) or none."""

    downsamplers: nn.ModuleList | None
    upsamplers: nn.ModuleList | None

    def __init__(self, source: int, width: int, count: int, groups: int, resample: str) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(source if j == 0 else width, width, groups=groups) for j in range(count)
        )
        down = resample == "down"
        self.downsamplers = nn.ModuleList([Downsample(width, asymmetric=True)]) if down else None
        self.upsamplers = nn.ModuleList([Upsample(width)]) if resample == "up" else None

    def forward(self, x: Tensor) -> Tensor:
        """`(B, source, h, w)` -> `(B, width, h', w')`."""
        for module in (*self.resnets, *(self.downsamplers or ()), *(self.upsamplers or ())):
            x = module(x)
        return x


class Encoder(nn.Module):
    """Picture -> mean and log-variance of the latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                width,
                config.layers_per_block,
                groups,
                "none" if i == len(widths) - 1 else "down",
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 3, H, W)` -> `(B, 2 * latent_channels, H/f, W/f)`."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        result: Tensor = self.conv_out(activated(self.conv_norm_out, x))
        return result


class Decoder(nn.Module):
    """Latents -> picture."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                width,
                config.layers_per_block + 1,
                groups,
                "none" if i == len(widths) - 1 else "up",
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """`(B, latent_channels, h, w)` -> `(B, 3, h*f, w*f)`."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        result: Tensor = self.conv_out(activated(self.conv_norm_out, x))
        return result


class Autoencoder(nn.Module):
    """Encoder and decoder around a diagonal Gaussian over latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        latents = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if config.post_quant_conv else nn.Identity()

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | picture).

        Args:
            pictures: `(B, 3, H, W)` in [-1, 1].

        Returns:
            Two tensors `(B, latent_channels, H/f, W/f)`, not scaled; the log-variance clamped to [-30, 20].
        """
        mean, log_variance = self.quant_conv(self.encoder(pictures)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """`z (B, latent_channels, h, w)`, not scaled -> `(B, 3, h*f, w*f)` in about [-1, 1]."""
        result: Tensor = self.decoder(self.post_quant_conv(z))
        return result

    def forward(self, pictures: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, draw a latent with `noise` (the mean without it), decode: `(picture, mean, log_variance)`."""
        mean, log_variance = self.encode(pictures)
        z = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise
        return self.decode(z), mean, log_variance
