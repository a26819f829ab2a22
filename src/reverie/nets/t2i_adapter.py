"""T2I-Adapters (Mou et al. 2023): small networks that see a picture and say what is added to a U-Net on the way down.

Parameter names are those of diffusers' `T2IAdapter`, without its `adapter.`; the style adapter's layers have the names
of CLIP's.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.errors import RequestError
from reverie.nets.clip_text import ClipTextConfig, Layer

Kind: TypeAlias = Literal["full_adapter", "full_adapter_xl", "light_adapter"]


@dataclass(frozen=True)
class T2IAdapterConfig:
    """The shape of a T2I-Adapter. The defaults are those for Stable Diffusion 1.

    Attributes:
        channels: of the picture: 3, or 1 for sketches and edges.
        widths: channels of each feature map.
        layers: residual blocks for each of them.
        factor: pixels of a side that become one place of the first feature map.
    """

    kind: Kind = "full_adapter"
    channels: int = 3
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    factor: int = 8

    def halved(self, level: int) -> bool:
        """Whether a feature map is half as large as the one before; of SDXL's adapters only the third is."""
        return level == 2 if self.kind == "full_adapter_xl" else level > 0


class AdapterResnet(nn.Module):
    """Two convolutions plus the input.

    Args:
        kernel: of the second convolution: 1, or 3 in light adapters.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(width, width, 3, padding=1)
        self.block2 = nn.Conv2d(width, width, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, width, h, w)` -> `(B, width, h, w)`."""
        result: Tensor = x + self.block2(F.relu(self.block1(x)))
        return result


class AdapterLevel(nn.Module):
    """One feature map: halved where the config says so, then residual blocks; light adapters are narrow inside."""

    def __init__(self, config: T2IAdapterConfig, level: int) -> None:
        super().__init__()
        light = config.kind == "light_adapter"
        width, first = config.widths[level], config.channels * config.factor**2 if light else config.widths[0]
        source = config.widths[level - 1] if level else first
        inner = width // 4 if light else width
        self.halved = config.halved(level)
        self.in_conv = nn.Conv2d(source, inner, 1) if light or source != width else None
        self.resnets = nn.Sequential(*(AdapterResnet(inner, 3 if light else 1) for _ in range(config.layers)))
        self.out_conv = nn.Conv2d(inner, width, 1) if light else None

    def forward(self, x: Tensor) -> Tensor:
        """`(B, source, h, w)` -> `(B, width, h, w)`, or `ceil(h/2)` and `ceil(w/2)`."""
        if self.halved:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        if self.in_conv is not None:
            x = self.in_conv(x)
        x = self.resnets(x)
        return x if self.out_conv is None else self.out_conv(x)


class T2IAdapter(nn.Module):
    """`picture -> feature maps`, computed once a picture, not once a step."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        if config.kind != "light_adapter":
            self.conv_in = nn.Conv2d(config.channels * config.factor**2, config.widths[0], 3, padding=1)
        self.body = nn.ModuleList(AdapterLevel(config, level) for level in range(len(config.widths)))

    def forward(self, picture: Tensor) -> list[Tensor]:
        """The feature maps of a picture.

        Args:
            picture: `(B, channels, H, W)` in [0, 1]. Sides that are no multiples of `factor` are continued by their
                last pixels.

        Returns:
            One map for each width, the finest first: `(B, width, ceil(H/factor), ceil(W/factor))`, ...

        Raises:
            RequestError: a picture of another number of channels.
        """
        if picture.shape[1] != self.config.channels:
            raise RequestError(
                f"this T2I-Adapter takes pictures of {self.config.channels} channels and was given {picture.shape[1]}"
            )
        factor = self.config.factor
        right, below = -picture.shape[-1] % factor, -picture.shape[-2] % factor
        x = F.pixel_unshuffle(F.pad(picture, (0, right, 0, below), mode="replicate"), factor)
        if self.config.kind != "light_adapter":
            x = self.conv_in(x)
        features = []
        for level in self.body:
            x = level(x)
            features.append(x)
        return features


@dataclass(frozen=True)
class StyleAdapterConfig:
    """The shape of a style adapter. The defaults are the published one's.

    Attributes:
        source: channels of the image encoder's states (CLIP ViT-L/14's).
        width: channels of the tokens, those of the prompt.
        heads: TencentARC/T2I-Adapter `adapter.py: StyleAdapter`; shapes do not show it.
    """

    source: int = 1024
    width: int = 768
    tokens: int = 8
    layers: int = 3
    heads: int = 8


class StyleAdapter(nn.Module):
    """Learnt tokens that look at a picture's states and follow the prompt's."""

    def __init__(self, config: StyleAdapterConfig) -> None:
        super().__init__()
        self.config = config
        shape = ClipTextConfig(width=config.source, inner_width=4 * config.source, heads=config.heads)
        self.style_embedding = nn.Parameter(torch.zeros(1, config.tokens, config.source))
        self.ln_pre = nn.LayerNorm(config.source)
        self.layers = nn.ModuleList(Layer(shape, causal=False) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(config.source)
        self.proj = nn.Linear(config.source, config.width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """`(B, N, source)`, the image encoder's last states -> `(B, tokens, width)`."""
        x = self.ln_pre(torch.cat([states, self.style_embedding.expand(len(states), -1, -1)], dim=1))
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.proj(self.ln_post(x[:, -self.config.tokens :]))
        return result
