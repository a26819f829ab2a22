"""UperNet on ConvNeXt: the class of every pixel of a scene (Xiao et al. 2018; Liu et al. 2022).

Names are those of transformers' layout (`openmmlab/upernet-convnext-small`); batch norms are folded into the
convolutions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOLS = (1, 2, 3, 6)  # sides of the pooled pictures (Zhao et al. 2017, PSPNet)


@dataclass(frozen=True)
class UperNetConfig:
    """The shape of a network; the defaults are those on ConvNeXt-Small for ADE20K.

    Attributes:
        widths: channels of the backbone's four stages.
        depths: blocks of each.
        width: channels of the head.
        classes: that are told apart.
    """

    widths: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 27, 3)
    width: int = 512
    classes: int = 150


def config_of(shapes: Mapping[str, Sequence[int]]) -> UperNetConfig:
    """The config that tensors of these names and shapes belong to.

    Raises:
        KeyError: not this network.
    """
    stages = range(4)
    prefix = "backbone.encoder.stages"
    widths = tuple(shapes[f"{prefix}.{i}.layers.0.dwconv.weight"][0] for i in stages)
    blocks = [{n.split(".")[5] for n in shapes if n.startswith(f"{prefix}.{i}.layers.")} for i in stages]
    classes, width = shapes["decode_head.classifier.weight"][:2]
    return UperNetConfig(widths, tuple(map(len, blocks)), width, classes)


class UperNet(nn.Module):
    """Backbone and head."""

    def __init__(self, config: UperNetConfig | None = None) -> None:
        super().__init__()
        config = config or UperNetConfig()
        self.backbone = ConvNext(config)
        self.decode_head = Head(config)

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, 3, H, W)`, ImageNet's mean and standard deviation taken out -> `(B, classes, H/4, W/4)`."""
        logits: Tensor = self.decode_head(self.backbone(x))
        return logits


class ConvNext(nn.Module):
    """Four stages, each of half the size; the answer of each, normed."""

    def __init__(self, config: UperNetConfig) -> None:
        super().__init__()
        first = config.widths[0]
        self.embeddings = nn.ModuleDict(
            {"patch_embeddings": nn.Conv2d(3, first, 4, 4), "layernorm": ChannelNorm(first)}
        )
        befores = (None, *config.widths[:-1])
        stages = (Stage(*shape) for shape in zip(befores, config.widths, config.depths, strict=True))
        self.encoder = nn.ModuleDict({"stages": nn.ModuleList(stages)})
        self.hidden_states_norms = nn.ModuleDict(
            {f"stage{i}": ChannelNorm(width) for i, width in enumerate(config.widths, 1)}
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(B, 3, H, W)` -> `(B, C, H/4, W/4)` to `(B, C''', H/32, W/32)`."""
        x = self.embeddings["layernorm"](self.embeddings["patch_embeddings"](x))
        answers: list[Tensor] = []
        for stage, norm in zip(self.encoder["stages"].children(), self.hidden_states_norms.values(), strict=True):
            x = stage(x)
            answers.append(norm(x))
        return answers


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a picture."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> the same shape."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Stage(nn.Module):
    """Halving, but in the first stage, and blocks."""

    def __init__(self, before: int | None, width: int, depth: int) -> None:
        super().__init__()
        halving = [] if before is None else [ChannelNorm(before), nn.Conv2d(before, width, 2, 2)]
        self.downsampling_layer = nn.Sequential(*halving)
        self.layers = nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, C', H/2, W/2)`."""
        y: Tensor = self.layers(self.downsampling_layer(x))
        return y


class Block(nn.Module):
    """A wide filter for each channel, then a perceptron at every place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.layernorm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.layer_scale_parameter = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> the same shape."""
        y = self.layernorm(self.dwconv(x).movedim(1, -1))
        y = self.layer_scale_parameter * self.pwconv2(F.gelu(self.pwconv1(y)))
        out: Tensor = x + y.movedim(-1, 1)
        return out


class Head(nn.Module):
    """What pooling at four sizes knows of the scene, brought down to the finest stage."""

    def __init__(self, config: UperNetConfig) -> None:
        super().__init__()
        *fine, last = config.widths
        width = config.width
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), conv_relu(last, width, 1)) for side in POOLS
        )
        self.bottleneck = conv_relu(last + len(POOLS) * width, width, 3)
        self.lateral_convs = nn.ModuleList(conv_relu(channels, width, 1) for channels in fine)
        self.fpn_convs = nn.ModuleList(conv_relu(width, width, 3) for _ in fine)
        self.fpn_bottleneck = conv_relu(len(config.widths) * width, width, 3)
        self.classifier = nn.Conv2d(width, config.classes, 1)

    def forward(self, answers: Sequence[Tensor]) -> Tensor:
        """The backbone's four answers -> `(B, classes, H/4, W/4)`."""
        pooled = [_resized(pool(answers[-1]), answers[-1]) for pool in self.psp_modules]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, answers[:-1], strict=True)]
        levels.append(self.bottleneck(torch.cat([answers[-1], *pooled], dim=1)))
        for index in reversed(range(len(levels) - 1)):
            levels[index] = levels[index] + _resized(levels[index + 1], levels[index])
        maps = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        joined = torch.cat([_resized(x, maps[0]) for x in maps], dim=1)
        logits: Tensor = self.classifier(self.fpn_bottleneck(joined))
        return logits


def conv_relu(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution with a folded batch norm, ReLU."""
    layers = nn.Sequential()
    layers.add_module("conv", nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2))
    layers.add_module("activation", nn.ReLU())
    return layers


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear")
