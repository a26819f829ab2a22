"""The denoising U-Net with cross-attention to the prompt (Rombach et al. 2022)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from reverie.errors import RequestError
from reverie.nets.attention import Attention, SpatialTransformer, TransformerBlock, each
from reverie.nets.blocks import (
    Downsample,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    activated,
    guidance_embedding,
    timestep_embedding,
)
from reverie.types import BeyondTap, Taps

NORM_EPS = 1e-5  # of the residual blocks and the last norm; CompVis `normalization`, diffusers `norm_eps`

Depths: TypeAlias = tuple[int | tuple[int, ...], ...]
"""Transformer blocks at each level: one number, or one for each residual block; 0 without attention."""

VectorKind: TypeAlias = Literal["", "add_embedding", "class_embedding", "class_table"]


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net. The defaults are Stable Diffusion 1.5.

    Attributes:
        block_out_channels: width of each level, from full resolution down.
        attention: depth of the transformers of each level on the way down; True counts as 1.
        up_attention: the same on the way up, the lowest resolution first; None where it mirrors `attention`.
        mid_attention: depth in the middle; 0 for one residual block alone (SSD-1B), None without a middle (BK-SDM).
        cross_only: whether the first attention of a level looks at the prompt, too (x4 upscaler); empty for none.
        heads: attention heads of each level.
        layers_per_block: residual blocks a level on the way down (one more on the way up).
        context_width: channels of the text encoder's output.
        vector: how a vector is added to the time embedding: by `add_embedding` (SDXL: pooled prompt and sizes), by
            `class_embedding` (unCLIP: an encoded picture), by a row of the table `class_embedding` (x4 upscaler: a
            noise level); empty for not at all.
        vector_width: channels of that vector, or rows of the table.
        size_width: channels in which the vector of SDXL tells each number.
        guidance_width: channels in which a distilled network is told the guidance scale (LCM); 0 for not at all.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: Depths = (1, 1, 1, 0)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    layers_per_block: int = 2
    context_width: int = 768
    groups: int = 32
    linear_projection: bool = False
    up_attention: Depths | None = None
    mid_attention: int | None = 1
    cross_only: tuple[bool, ...] = ()
    vector: VectorKind = ""
    vector_width: int = 0
    size_width: int = 256
    guidance_width: int = 0

    @property
    def time_width(self) -> int:
        """Channels of the time embedding."""
        return 4 * self.block_out_channels[0]

    def down_depths(self, level: int) -> tuple[int, ...]:
        """Depth of the transformer behind each residual block of a level on the way down."""
        return _each(self.attention[level], self.layers_per_block)

    def up_depths(self, level: int) -> tuple[int, ...]:
        """Depth of the transformer behind each residual block of a level on the way up."""
        depths = self.attention[::-1] if self.up_attention is None else self.up_attention
        return _each(depths[len(depths) - 1 - level], self.layers_per_block + 1)


def _each(depth: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    """One depth a residual block.

    Raises:
        ValueError: there are as many neither as residual blocks nor as one.
    """
    depths = (int(depth),) * count if isinstance(depth, int) else depth
    if len(depths) != count:
        raise ValueError(f"{len(depths)} depths of transformers for {count} residual blocks")
    return depths


class DownBlock(nn.Module):
    """One level of the way down: residual blocks, each followed by attention where the level has it."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        width = config.block_out_channels[level]
        source = config.block_out_channels[max(level - 1, 0)]
        self.resnets = nn.ModuleList(
            _resnet(config, source if j == 0 else width, width) for j in range(config.layers_per_block)
        )
        self.attentions = _attentions(config, level, config.down_depths(level))
        self.path = ""
        last = level == len(config.block_out_channels) - 1
        self.downsamplers = None if last else nn.ModuleList([Downsample(width)])
        self.steps = config.layers_per_block + (not last)

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor, taps: Taps | None = None, steps: range | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the last map and every map that the way up will want.

        Args:
            steps: which of them to do: residual blocks, then what makes the map smaller; all if None.
        """
        steps = range(self.steps) if steps is None else steps
        skips = []
        for j, resnet in enumerate(self.resnets):
            if j not in steps:
                continue
            x = resnet(x, time[: len(x)])
            if self.attentions is not None:
                x = self.attentions[j](x, context, taps)
            if taps:
                x = taps.changed(f"{self.path}.{j}", x)
                x = taps.plus(self.path, x) if j == len(self.resnets) - 1 else x
            skips.append(x)
        if self.downsamplers is not None and len(self.resnets) in steps:
            x = self.downsamplers[0](x)
            if taps:
                x = taps.plus(f"{self.path}.downsamplers", x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution; or one residual block alone.

    Args:
        depth: of the transformer; 0 without it and what follows.
    """

    def __init__(self, config: UNetConfig, depth: int) -> None:
        super().__init__()
        width, level = config.block_out_channels[-1], len(config.block_out_channels) - 1
        self.resnets = nn.ModuleList(_resnet(config, width, width) for _ in range(2 if depth else 1))
        self.attentions = nn.ModuleList([_attention(config, level, depth)]) if depth else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor, taps: Taps | None = None) -> Tensor:
        """`(B, C, h, w)` -> `(B, C, h, w)`."""
        x = self.resnets[0](x, time[: len(x)])
        if self.attentions is not None:
            x = self.resnets[1](self.attentions[0](x, context, taps), time)
        return x


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
        self.attentions = _attentions(config, level, config.up_depths(level))
        self.upsamplers = nn.ModuleList([Upsample(width)]) if level > 0 else None
        self.steps = count

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        time: Tensor,
        context: Tensor,
        taps: Taps | None = None,
        steps: range | None = None,
    ) -> Tensor:
        """Takes its maps from the end of `skips`.

        Args:
            steps: which of its residual blocks to do, the last with what makes the map larger; all if None.
        """
        steps = range(self.steps) if steps is None else steps
        tap = taps.skips.get(self.path) if taps else None
        for j, resnet in enumerate(self.resnets):
            if j not in steps:
                continue
            skip = skips.pop()
            if tap:
                x, skip = tap(x, skip)
            x = resnet(torch.cat([x, skip], dim=1), time)
            if self.attentions is not None:
                x = self.attentions[j](x, context, taps)
            if taps:
                x = taps.changed(f"{self.path}.{j}", x)
        if self.upsamplers is not None and self.steps - 1 in steps:
            h, w = skips[-1].shape[-2:]
            x = self.upsamplers[0](x, (h, w))
        return x


class Encoder(nn.Module):
    """The way down of a U-Net and its middle: all of it but the way up. A ControlNet is a copy of it."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], config.time_width, config.guidance_width)
        self.add_embedding = _vector_embedding(config) if config.vector == "add_embedding" else None
        self.class_embedding = _vector_embedding(config) if config.vector.startswith("class") else None
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(len(widths)))
        self.mid_block = None if config.mid_attention is None else MidBlock(config, config.mid_attention)
        self.name_layers()

    def name_layers(self) -> None:
        """Tell every layer that can be tapped its path."""
        for path, module in self.named_modules():
            if isinstance(module, Attention | TransformerBlock | DownBlock | UpBlock):
                module.path = path

    def timed(
        self, x: Tensor, timesteps: Tensor, vector: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """The time embedding with what vector and guidance scale add to it: `(B, time_width)`; see `UNet.forward`."""
        if x.shape[1] != self.config.in_channels:
            raise RequestError(f"the network takes {self.config.in_channels} channels and was given {x.shape[1]}")
        time = self._time(timesteps, guidance, x.dtype)
        return time + self._added(vector, x) if self.config.vector else time

    def encoded(
        self, x: Tensor, time: Tensor, context: Tensor, taps: Taps | None = None, hint: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """What the middle says, and every map that the way up will want.

        Args:
            time: what `timed` gave.
            hint: `(1 or B, C, h, w)`, added to the features of `x` (ControlNet).
        """
        x = self.conv_in(x)
        if hint is not None:
            x = x + hint
        skips = self.lowered([x], self.maps, time, context, taps)
        return self.middle(skips[-1], time, context, taps), skips

    @property
    def maps(self) -> int:
        """How many maps the way up will want: that of `conv_in`, and one for each step down."""
        return 1 + sum(steps for _, steps in _stages(self.down_blocks))

    def lowered(
        self, skips: list[Tensor], count: int, time: Tensor, context: Tensor, taps: Taps | None = None
    ) -> list[Tensor]:
        """The first `count` maps, of which `skips` are there."""
        found, x, done = list(skips), skips[-1], 1
        for block, steps in _stages(self.down_blocks):
            todo = range(max(len(skips) - done, 0), min(count - done, steps))
            if todo:
                x, new = block(x, time, context, taps, todo)
                found += new
            done += steps
        return found

    def middle(self, x: Tensor, time: Tensor, context: Tensor, taps: Taps | None = None) -> Tensor:
        """What the middle makes of the last map."""
        if self.mid_block is None:
            return x
        x = self.mid_block(x, time, context, taps)
        return taps.changed("mid_block", x) if taps else x

    def _time(self, timesteps: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        embedding = timestep_embedding(timesteps, self.config.block_out_channels[0]).to(dtype)
        width = self.config.guidance_width
        if width and guidance is None:
            raise RequestError("this model was distilled to be told the guidance scale, and was told none")
        told = None if not width or guidance is None else guidance_embedding(guidance, width).to(dtype)
        result: Tensor = self.time_embedding(embedding, told)
        return result

    def _added(self, vector: Tensor | None, x: Tensor) -> Tensor:
        """What the vector adds to the time embedding: `(B, time_width)`."""
        table = self.config.vector == "class_table"
        width = 1 if table else self.config.vector_width
        if vector is None or vector.shape != (len(x), width):
            found = "none" if vector is None else f"one of shape {list(vector.shape)}"
            raise RequestError(f"this model wants a vector of {width} numbers for each picture, and was given {found}")
        embedding = self.add_embedding if self.class_embedding is None else self.class_embedding
        assert embedding is not None
        result: Tensor = embedding(vector[:, 0].long() if table else vector.to(x.dtype))
        return result


class UNet(Encoder):
    """`F(x, t, context)`: what it predicts is the business of the parameterisation."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths = config.block_out_channels
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(range(len(widths))))
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self.name_layers()

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        taps: Taps | None = None,
        *,
        vector: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """One evaluation.

        Args:
            x: `(B, in_channels, h, w)`, the noisy latents scaled to unit variance.
            timesteps: `(B,)`, may be fractional.
            context: `(B, M, context_width)`, the encoded prompt.
            taps: where this evaluation differs.
            vector: `(B, vector_width)`, for models that want it; `(B, 1)` the row where they have a table.
            guidance: `(B,)`, guidance scales, for models that were distilled to be told.

        Returns:
            `(B, out_channels, h, w)`.

        Raises:
            RequestError: a vector or guidance that the model needs is missing, `x` or the vector not of its width, or
                a map that is tapped but not there.
        """
        time = self.timed(x, timesteps, vector, guidance)
        near, tap = self._tapped(taps)
        first = self.conv_in(x[: len(x) // self._copies(taps)])
        skips = self.lowered([first], near, time, context, taps)

        def beyond() -> Tensor:
            every = self.lowered(skips, self.maps, time, context, taps)
            y = each(self.middle(every[-1], time, context, taps), len(x))
            y = taps.plus("mid_block", y) if taps else y
            return self._raised(y, every, near, time, context, taps)

        x = tap(skips[0], skips[-1], beyond) if tap else beyond()
        x = self._raised(x, skips, 0, time, context, taps)
        result: Tensor = self.conv_out(activated(self.conv_norm_out, x))
        return result

    def _copies(self, taps: Taps | None) -> int:
        """How many equal parts the batch begins as: more than one where no tap looks before the context does."""
        if not taps or taps.attention or taps.bypass or taps.added or taps.features or taps.merging:
            return 1
        return taps.copies

    def _tapped(self, taps: Taps | None) -> "tuple[int, BeyondTap | None]":
        """How many maps are on this side of `Taps.beyond`, all where it is not used; and what answers for the rest."""
        if not taps or not taps.beyond:
            return self.maps, None
        ((place, tap),) = taps.beyond.items()
        number = int(place.removeprefix("skips."))
        if number >= self.maps - 1:
            raise RequestError(
                f"nothing lies beyond map {number} of this U-Net: the last one before is {self.maps - 2}"
            )
        return number + 1, tap

    def _raised(
        self, x: Tensor, skips: list[Tensor], left: int, time: Tensor, context: Tensor, taps: Taps | None
    ) -> Tensor:
        """The way up over the last of these maps, until `left` of them are left."""
        there = [each(skip, len(context)) for skip in skips]
        if taps:
            there[left:] = [taps.plus(f"skips.{left + i}", skip) for i, skip in enumerate(there[left:])]
        upto = self.maps  # blocks take them from the last
        for block, steps in _stages(self.up_blocks):
            todo = range(max(upto - len(skips), 0), min(upto - left, steps))
            if todo:
                x = block(x, there, time, context, taps, todo)
            upto -= steps
        return x


def _stages(blocks: nn.ModuleList) -> Iterator[tuple[nn.Module, int]]:
    """The blocks of the way down or up, and how many steps each of them has."""
    for block in blocks:
        assert isinstance(block, DownBlock | UpBlock)
        yield block, block.steps


def _vector_embedding(config: UNetConfig) -> nn.Module:
    if config.vector == "class_table":
        return nn.Embedding(config.vector_width, config.time_width)
    return TimestepEmbedding(config.vector_width, config.time_width)


def _resnet(config: UNetConfig, source: int, width: int) -> ResnetBlock:
    return ResnetBlock(source, width, time_width=config.time_width, groups=config.groups, eps=NORM_EPS)


def _attention(config: UNetConfig, level: int, depth: int, *, cross_only: bool = False) -> SpatialTransformer:
    return SpatialTransformer(
        config.block_out_channels[level],
        config.heads[level],
        config.context_width,
        depth=depth,
        groups=config.groups,
        linear_projection=config.linear_projection,
        cross_only=cross_only,
    )


def _attentions(config: UNetConfig, level: int, depths: tuple[int, ...]) -> nn.ModuleList | None:
    """A transformer behind each residual block of a level, or none.

    Raises:
        ValueError: behind some and not behind others, which no published model has.
    """
    if not any(depths):
        return None
    if not all(depths):
        raise ValueError(f"transformers of depths {list(depths)} at one level: all or none of them must be there")
    cross_only = bool(config.cross_only) and config.cross_only[level]
    return nn.ModuleList(_attention(config, level, depth, cross_only=cross_only) for depth in depths)
