"""ControlNet (Zhang et al. 2023): a copy of a U-Net's encoder that is shown a picture and whose answers are added to
those of the U-Net.

Parameter names are those of diffusers' `ControlNetModel` and `ControlNetUnionModel`. A Union (xinsir's
controlnet-union-sdxl) is one network for many kinds of control pictures: it is told the kind twice, by a learned vector
beside the picture and by what is added to the time embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.errors import RequestError
from reverie.nets.blocks import TimestepEmbedding, timestep_embedding
from reverie.nets.unet import Encoder, UNet, UNetConfig

M = TypeVar("M", bound=nn.Module)

WIDTHS = (16, 32, 96, 256)  # of the picture's small network, each half the size of the one before (section 3.3)
UNION_WIDTHS = (48, 96, 192, 384)  # of the published Union's
QUICK = 1.702  # of the sigmoid that stands for GELU in CLIP's blocks


@dataclass(frozen=True)
class UnionConfig:
    """What a Union has beside a ControlNet. The defaults are the first published one; ProMax has 8 kinds.

    Attributes:
        kinds: of control pictures.
        width: channels of the tokens, one for each picture.
        heads, layers: of the blocks that those tokens go through.
    """

    kinds: int = 6
    width: int = 320
    heads: int = 8
    layers: int = 1


@dataclass(frozen=True)
class ControlNetConfig:
    """The shape of a ControlNet.

    Attributes:
        unet: of the U-Net whose encoder it is a copy of; the way up is not looked at.
        channels: of the control picture.
        widths: of the network that makes features of it; each further one halves the picture.
        bgr: the picture's channels are blue, green, red.
        pooled: only the mean of every map is added, and to the rows of the prompt alone (shuffle).
    """

    unet: UNetConfig
    channels: int = 3
    widths: tuple[int, ...] = WIDTHS
    bgr: bool = False
    pooled: bool = False
    union: UnionConfig | None = None

    @property
    def factor(self) -> int:
        """Pixels of the control picture along the side of a latent."""
        return int(2 ** (len(self.widths) - 1))


@dataclass(frozen=True, eq=False)
class Hint:
    """What a ControlNet makes of its picture. It depends on neither noise nor time: once for each picture is enough.

    Attributes:
        features: `(1 or B, C, h, w)`, added to those of the noisy latents.
        time: `(1, time_width)`, added to the time embedding (Union).
    """

    features: Tensor
    time: Tensor | None = None


class PictureEmbedding(nn.Module):
    """The small network that brings the control picture to the size of the latents."""

    def __init__(self, channels: int, widths: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for here, there in pairwise(widths):
            self.blocks.append(nn.Conv2d(here, here, 3, padding=1))
            self.blocks.append(nn.Conv2d(here, there, 3, stride=2, padding=1))
        self.conv_out = zeroed(nn.Conv2d(widths[-1], width, 3, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        """`(B, channels, H, W)` -> `(B, width, H/f, W/f)`."""
        x = F.silu(self.conv_in(pictures))
        for block in self.blocks:
            x = F.silu(block(x))
        result: Tensor = self.conv_out(x)
        return result


class TokenMlp(nn.Module):
    """The feed-forward of `TokenBlock`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` -> `(..., width)`."""
        y = self.c_fc(x)
        result: Tensor = self.c_proj(y * torch.sigmoid(QUICK * y))
        return result


class TokenBlock(nn.Module):
    """A block of CLIP's transformer over the tokens of a Union's pictures.

    The published network was trained with tokens and batch in each other's place: a token sees none of the other
    tokens, only its like in the batch. In a batch that shows one picture those are all equal, and the softmax over them
    is the token itself: so it is computed here, whatever the batch.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = TokenMlp(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """`(1, N, width)` -> `(1, N, width)`: N sequences of one token."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        result: Tensor = x + self.mlp(self.ln_2(x))
        return result


class ControlNet(Encoder):
    """`F(x, t, context, hint)`: what is added to every map that a U-Net's way up will want, and to its middle."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.unet)
        self.control = config
        widths, layers = config.unet.block_out_channels, config.unet.layers_per_block
        self.controlnet_cond_embedding = PictureEmbedding(config.channels, config.widths, widths[0])
        maps = [widths[0]]
        for level, width in enumerate(widths):
            maps += [width] * (layers if level == len(widths) - 1 else layers + 1)
        self.controlnet_down_blocks = nn.ModuleList(zeroed(nn.Conv2d(width, width, 1)) for width in maps)
        self.controlnet_mid_block = zeroed(nn.Conv2d(widths[-1], widths[-1], 1))
        if config.union is not None:
            self._add_union(config.union)

    def _add_union(self, union: UnionConfig) -> None:
        self.task_embedding = nn.Parameter(union.width**0.5 * torch.randn(union.kinds, union.width))
        blocks = (TokenBlock(union.width, union.heads) for _ in range(union.layers))
        self.transformer_layes = nn.ModuleList(blocks)  # so spelled in every published file
        self.spatial_ch_projs = zeroed(nn.Linear(union.width, self.config.block_out_channels[0]))
        told = union.kinds * self.config.size_width
        self.control_add_embedding = TimestepEmbedding(told, self.config.time_width)

    @classmethod
    def from_unet(cls, unet: UNet, *, channels: int = 3, widths: tuple[int, ...] = WIDTHS) -> "ControlNet":
        """A ControlNet to be trained: the encoder's weights copied, all that is added to the U-Net zero.

        Args:
            channels: of the control picture.
            widths: one more than the VAE halves the picture times, see `widths_for`.
        """
        latents = unet.config.out_channels
        config = replace(unet.config, in_channels=latents, up_attention=None, guidance_width=0)
        network = cls(ControlNetConfig(config, channels, widths))
        names, own = unet.state_dict(), network.state_dict()
        copied = {name: names[name] for name in own if name in names}
        copied["conv_in.weight"] = copied["conv_in.weight"][:, :latents]
        network.load_state_dict(own | copied)
        return network

    @property
    def maps(self) -> int:
        """How many maps it answers with, the middle being the last."""
        return len(self.controlnet_down_blocks) + 1

    def hint(
        self, pictures: Sequence[Tensor], kinds: Sequence[int] = (), weights: Sequence[float] | None = None
    ) -> Hint:
        """What is made of the control picture, or of several pictures of different kinds (Union).

        Args:
            pictures: each `(1 or B, channels, H, W)` in [0, 1]; pixels to be drawn anew are -1 where the network was
                trained so (inpaint).
            kinds: of a Union, the kind of each picture.
            weights: of a Union, how strongly each picture counts; 1 if None.

        Raises:
            RequestError: a picture of other channels, or a kind that the network does not know.
        """
        if wrong := [p.shape[1] for p in pictures if p.shape[1] != self.control.channels]:
            raise RequestError(f"the ControlNet is shown {self.control.channels} channels and was given {wrong[0]}")
        shown = [p.flip(1) if self.control.bgr else p for p in pictures]
        features = [self.controlnet_cond_embedding(p) for p in shown]
        if self.control.union is None:
            return Hint(torch.stack(features).sum(0) if len(features) > 1 else features[0])
        return self._union_hint(self.control.union, features, kinds, weights or [1.0] * len(features))

    def _union_hint(
        self, union: UnionConfig, features: list[Tensor], kinds: Sequence[int], weights: Sequence[float]
    ) -> Hint:
        if len(kinds) != len(features) or not all(0 <= kind < union.kinds for kind in kinds):
            raise RequestError(
                f"this ControlNet is told the kind of each picture, a number from 0 to {union.kinds - 1}; it was given "
                f"{', '.join(map(str, kinds)) or 'none'} for {len(features)} pictures"
            )
        found: Tensor | None = None
        for feature, kind, weight in zip(features, kinds, weights, strict=True):
            token = (feature.mean((2, 3)) + self.task_embedding[kind]) * weight
            for block in self.transformer_layes:
                token = block(token[None])[0]
            shift = self.spatial_ch_projs(token)[:, :, None, None]
            found = weight * (feature + shift) + (0 if found is None else found)
        assert found is not None
        told = torch.zeros(union.kinds, device=found.device)
        told[list(kinds)] = 1.0
        sines = timestep_embedding(told, self.config.size_width).flatten()[None].to(found.dtype)
        return Hint(found, self.control_add_embedding(sines))

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, hint: Hint, *, vector: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """One evaluation.

        Args:
            x, timesteps, context, vector: as for the U-Net; `x` without what is concatenated to the latents.
            hint: see `hint`; its batch is 1 or that of `x`.

        Returns:
            What is added to each map, in the order in which the U-Net makes them, and last to its middle:
            `(B, C, h, w)` each, `(B, C, 1, 1)` where they are pooled.

        Raises:
            RequestError: the picture is not of the size of what is drawn; see `UNet.forward`.
        """
        if hint.features.shape[-2:] != x.shape[-2:]:
            shown, drawn = ([n * self.control.factor for n in t.shape[:-3:-1]] for t in (hint.features, x))
            raise RequestError(
                f"a control picture of {shown[0]} x {shown[1]} pixels for a drawing of {drawn[0]} x {drawn[1]}"
            )
        time = self.timed(x, timesteps, vector)
        if hint.time is not None:
            time = time + hint.time
        middle, skips = self.encoded(x, time, context, hint=hint.features)
        found = [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        found.append(self.controlnet_mid_block(middle))
        return tuple(t.mean((2, 3), keepdim=True) if self.control.pooled else t for t in found)


def widths_for(factor: int) -> tuple[int, ...]:
    """The first `widths` of a ControlNet for a VAE with so many pixels along the side of a latent.

    Raises:
        ValueError: no power of two up to 8.
    """
    if factor not in {1, 2, 4, 8}:
        raise ValueError(f"{factor} pixels to a latent; expected 1, 2, 4 or 8")
    return WIDTHS[: factor.bit_length()]


def zeroed(module: M) -> M:
    """The module with weights of zero: at first training changes nothing (section 3.1, "zero convolution")."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
