"""The layers of MobileNetV2 (Sandler et al. 2018), as the networks that were converted from TensorFlow use them.

Batch norms are folded into the convolutions (`reverie.control.weights.folded`); an `Identity` keeps their place, so
that parameters are named as in the published files.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's `SAME`: what does not divide evenly goes to the right and to the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, C, H, W)` -> `(B, C', ceil(H / stride), ceil(W / stride))`."""
        pads: list[int] = []
        for size, kernel, stride, dilation in zip(
            reversed(x.shape[-2:]), reversed(self.kernel_size), reversed(self.stride), reversed(self.dilation),
            strict=True,
        ):  # fmt: skip
            total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


class ConvBNReLU6(nn.Sequential):
    """Convolution, (folded) batch norm, ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, dilation: int = 1
    ) -> None:
        conv = SameConv2d(inputs, outputs, kernel, stride, dilation=dilation, groups=groups)
        super().__init__(conv, nn.Identity(), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Widen, filter every channel on its own, narrow; added to what came in where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, dilation: int = 1) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        wide = [ConvBNReLU6(inputs, hidden, kernel=1)] if expansion != 1 else []
        filtered = ConvBNReLU6(hidden, hidden, stride=stride, groups=hidden, dilation=dilation)
        self.conv = nn.Sequential(*wide, filtered, nn.Conv2d(hidden, outputs, 1), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, C, H, W)` -> `(B, C', H / stride, W / stride)`."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


def features(channels: int, first: int, stages: tuple[tuple[int, int, int, int, int], ...]) -> nn.Sequential:
    """The first convolution and the blocks after it.

    Args:
        channels: of the picture.
        first: channels of the first convolution, which halves both sides.
        stages: expansion, channels, blocks, stride of the first block, dilation of the blocks; the paper's table 2. A
            block that changes the channels keeps the dilation of the stage before, as in DeepLab.
    """
    layers: list[nn.Module] = [ConvBNReLU6(channels, first, stride=2)]
    width, rate = first, 1
    for expansion, outputs, blocks, stride, dilation in stages:
        for index in range(blocks):
            rate = dilation if index else rate
            layers.append(InvertedResidual(width, outputs, stride if index == 0 else 1, expansion, rate))
            width = outputs
        rate = dilation
    return nn.Sequential(*layers)
