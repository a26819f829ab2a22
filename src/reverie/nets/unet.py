"""The denoising U-Net with cross-attention to the prompt (Rombach et al. 2022)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.nets.attention import Attention, SpatialTransformer, TransformerBlock
from reverie.nets.blocks import Downsample, ResnetBlock, TimestepEmbedding, Upsample, timestep_embedding
from reverie.types import Taps

NORM_EPS = 1e-5  # of the residual blocks and the last norm; CompVis `normalization`, diffusers `norm_eps`


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net. The defaults are Stable Diffusion 1.5.

    Attributes:
        block_out_channels: width of each level, from full resolution down.
        attention: whether each level attends to the prompt.
        heads: attention heads of each level.
        layers_per_block: residual blocks a level on the way down (one more on the way up).
        context_width: channels of the text encoder's output.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    layers_per_block: int = 2
    context_width: int = 768
    groups: int = 32
    linear_projection: bool = False

    @property
    def time_width(self) -> int:
        """Channels of the time embedding."""
        return 4 * self.block_out_channels[0]


class DownBlock(nn.Module):
    """One level of the way down: residual blocks, each followed by attention where the level has it."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        width = config.block_out_channels[level]
        source = config.block_out_channels[max(level - 1, 0)]
        self.resnets = nn.ModuleList(
            _resnet(config, source if j == 0 else width, width) for j in range(config.layers_per_block)
        )
        self.attentions = _attentions(config, level, config.layers_per_block)
        last = level == len(config.block_out_channels) - 1
        self.downsamplers = None if last else nn.ModuleList([Downsample(width)])

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor, taps: Taps | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the smaller map and every map that the way up will want."""
        skips = []
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions is not None:
                x = self.attentions[j](x, context, taps)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([_attention(config, len(config.block_out_channels) - 1)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor, taps: Taps | None = None) -> Tensor:
        """`(B, C, h, w)` -> `(B, C, h, w)`."""
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context, taps)
        result: Tensor = self.resnets[1](x, time)
        return result


class UpBlock(nn.Module):
    """One level of the way up; every residual block also takes one map from the way down.

    Args:
        level: index into `block_out_channels` (so the levels are built in descending order).
    """

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        self.path = ""
        widths = config.block_out_channels
        width = widths[level]
        below = widths[min(level + 1, len(widths) - 1)]
        count = config.layers_per_block + 1
        skips = [width] * (count - 1) + [widths[max(level - 1, 0)]]
        sources = [below] + [width] * (count - 1)
        self.resnets = nn.ModuleList(
            _resnet(config, source + skip, width) for source, skip in zip(sources, skips, strict=True)
        )
        self.attentions = _attentions(config, level, count)
        self.upsamplers = nn.ModuleList([Upsample(width)]) if level > 0 else None

    def forward(
        self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor, taps: Taps | None = None
    ) -> Tensor:
        """Takes its maps from the end of `skips`."""
        tap = taps.skips.get(self.path) if taps else None
        for j, resnet in enumerate(self.resnets):
            skip = skips.pop()
            if tap:
                x, skip = tap(x, skip)
            x = resnet(torch.cat([x, skip], dim=1), time)
            if self.attentions is not None:
                x = self.attentions[j](x, context, taps)
        if self.upsamplers is not None:
            h, w = skips[-1].shape[-2:]
            x = self.upsamplers[0](x, (h, w))
        return x


class UNet(nn.Module):
    """`F(x, t, context)`: what it predicts is the business of the parameterisation."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        levels = range(len(widths))
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], config.time_width)
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in levels)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        for path, module in self.named_modules():
            if isinstance(module, Attention | TransformerBlock | UpBlock):
                module.path = path

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, taps: Taps | None = None) -> Tensor:
        """One evaluation.

        Args:
            x: `(B, in_channels, h, w)`, the noisy latents scaled to unit variance.
            timesteps: `(B,)`, may be fractional.
            context: `(B, M, context_width)`, the encoded prompt.
            taps: where this evaluation differs.

        Returns:
            `(B, out_channels, h, w)`.
        """
        embedding = timestep_embedding(timesteps, self.config.block_out_channels[0])
        time = self.time_embedding(embedding.to(x.dtype))
        x = self.conv_in(x)
        skips = [x]
        for down in self.down_blocks:
            x, new = down(x, time, context, taps)
            skips += new
        x = self.mid_block(x, time, context, taps)
        for up in self.up_blocks:
            x = up(x, skips, time, context, taps)
        result: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return result


def _resnet(config: UNetConfig, source: int, width: int) -> ResnetBlock:
    return ResnetBlock(source, width, time_width=config.time_width, groups=config.groups, eps=NORM_EPS)


def _attention(config: UNetConfig, level: int) -> SpatialTransformer:
    return SpatialTransformer(
        config.block_out_channels[level],
        config.heads[level],
        config.context_width,
        groups=config.groups,
        linear_projection=config.linear_projection,
    )


def _attentions(config: UNetConfig, level: int, count: int) -> nn.ModuleList | None:
    if not config.attention[level]:
        return None
    return nn.ModuleList(_attention(config, level) for _ in range(count))
