"""Lightweight OpenPose (Osokin 2018): where joints are, and which belong together.

Names are those of the published `checkpoint_iter_370000.pth`; batch norms are folded into the convolutions.
"""

import torch
from torch import Tensor, nn

# Output channels, stride, dilation of MobileNet's separable convolutions up to conv5_5 (section 3.3).
BACKBONE = ((64, 1, 1), (128, 2, 1), (128, 1, 1), (256, 2, 1), (256, 1, 1), (512, 1, 1), (512, 1, 2), (512, 1, 1),
            (512, 1, 1), (512, 1, 1), (512, 1, 1))  # fmt: skip
HEATMAPS, FIELDS = 19, 38  # 18 joints and the background; 19 limbs, x and y of each
INITIAL_WIDTH = 512  # of the first heads


class OpenPoseLight(nn.Module):
    """MobileNet, one stage that guesses, and stages that refine.

    Args:
        refinements: 1 in the paper's fastest form, 3 in the file with the best accuracy.
        width: channels between the stages.
        backbone: output channels, stride and dilation of each separable convolution.
    """

    def __init__(
        self, refinements: int = 3, width: int = 128, backbone: tuple[tuple[int, int, int], ...] = BACKBONE
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv(3, 32, stride=2, norm=True)]
        before = 32
        for channels, stride, dilation in backbone:
            layers.append(separable(before, channels, stride, dilation))
            before = channels
        self.model = nn.Sequential(*layers)
        self.cpm = Narrow(before, width)
        self.initial_stage = InitialStage(width)
        self.refinement_stages = nn.ModuleList(
            RefinementStage(width + HEATMAPS + FIELDS, width) for _ in range(refinements)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Confidence maps of joints and fields of limbs.

        Args:
            x: `(B, 3, H, W)`, BGR, `(value - 128) / 256` of values in 0..255.

        Returns:
            `(B, 19, H/8, W/8)` and `(B, 38, H/8, W/8)`.
        """
        features = self.cpm(self.model(x))
        heatmaps, fields = self.initial_stage(features)
        for stage in self.refinement_stages:
            heatmaps, fields = stage(torch.cat([features, heatmaps, fields], dim=1))
        return heatmaps, fields


class Narrow(nn.Module):
    """From the backbone's width to that of the stages."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.align = conv(inputs, width, 1)
        self.trunk = nn.Sequential(*(separable_elu(width) for _ in range(3)))
        self.conv = conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, width, h, w)`."""
        x = self.align(x)
        y: Tensor = self.conv(x + self.trunk(x))
        return y


class InitialStage(nn.Module):
    """The first guess."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(conv(width, width) for _ in range(3)))
        self.heatmaps, self.pafs = head(width, INITIAL_WIDTH, HEATMAPS), head(width, INITIAL_WIDTH, FIELDS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, width, h, w)` -> heat maps and fields."""
        x = self.trunk(x)
        return self.heatmaps(x), self.pafs(x)


class RefinementStage(nn.Module):
    """A guess, refined."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(RefinementBlock(before, width) for before in (inputs, *[width] * 4)))
        self.heatmaps, self.pafs = head(width, width, HEATMAPS), head(width, width, FIELDS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, width + 57, h, w)` -> heat maps and fields."""
        x = self.trunk(x)
        return self.heatmaps(x), self.pafs(x)


class RefinementBlock(nn.Module):
    """A residual pair of convolutions, which sees as far as one of 7 x 7."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.initial = conv(inputs, width, 1)
        self.trunk = nn.Sequential(conv(width, width, norm=True), conv(width, width, dilation=2, norm=True))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, width, h, w)`."""
        x = self.initial(x)
        y: Tensor = x + self.trunk(x)
        return y


def conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1, *,
    norm: bool = False, relu: bool = True,
) -> nn.Sequential:  # fmt: skip
    """Convolution, the place of a folded batch norm, ReLU."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation)]
    layers += [nn.Identity()] if norm else []
    layers += [nn.ReLU()] if relu else []
    return nn.Sequential(*layers)


def separable(inputs: int, outputs: int, stride: int, dilation: int) -> nn.Sequential:
    """A filter for each channel, then a mixture of them; batch norms folded."""
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, dilation, dilation, groups=inputs)
    return nn.Sequential(depthwise, nn.Identity(), nn.ReLU(), nn.Conv2d(inputs, outputs, 1), nn.Identity(), nn.ReLU())


def separable_elu(width: int) -> nn.Sequential:
    """The same with ELU, and neither norm nor bias."""
    depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
    return nn.Sequential(depthwise, nn.ELU(), nn.Conv2d(width, width, 1, bias=False), nn.ELU())


def head(inputs: int, hidden: int, maps: int) -> nn.Sequential:
    """Two mixtures of channels, the last without ReLU."""
    return nn.Sequential(conv(inputs, hidden, 1), conv(hidden, maps, 1, relu=False))
