"""M-LSD: straight line segments (Gu et al. 2022, "Towards Light-weight and Real-time Line Segment Detection")."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.nets.mobilenet import features

# Expansion, channels, blocks, stride, dilation: MobileNetV2 to its fifth stage (section 3.1).
STAGES = ((1, 16, 1, 1, 1), (6, 24, 2, 2, 1), (6, 32, 3, 2, 1), (6, 64, 4, 2, 1), (6, 96, 3, 1, 1))
TAPS = (1, 3, 6, 10, 13)  # blocks whose answers the decoder sees, at 1/2, 1/4, 1/8, 1/16 and 1/16
WIDTH, MAPS = 64, 16
CENTRE, DISPLACEMENT = 7, slice(8, 12)  # of the 16 maps; the others serve training


class Mlsd(nn.Module):
    """M-LSD-large.

    Args:
        anew: for the weights that were trained anew in PyTorch (`mlsd_large_512_fp32.pth`), whose decoder enlarges
            after its convolution, corner on corner; the original, in TensorFlow, enlarges before it.
        width: channels of the decoder.
    """

    def __init__(self, anew: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"features": features(4, 32, STAGES)})
        self.block15 = Merge(64, 96, width, enlarge=False, anew=anew)
        self.block16 = Refine(2 * width, width)
        self.block17 = Merge(32, width, width, enlarge=True, anew=anew)
        self.block18 = Refine(2 * width, width)
        self.block19 = Merge(24, width, width, enlarge=True, anew=anew)
        self.block20 = Refine(2 * width, width)
        self.block21 = Merge(16, width, width, enlarge=True, anew=anew)
        self.block22 = Refine(2 * width, width)
        self.block23 = Predict(width, MAPS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where the middles of segments are, and where from there their ends.

        Args:
            x: `(B, 4, H, W)`, H and W multiples of 16: RGB in [-1, 1], and a fourth channel of (1 / 127.5) - 1: a one
                that the published preprocessing treats as a colour.

        Returns:
            `(B, 1, H/2, W/2)` logits of a middle, and `(B, 4, H/2, W/2)`: x and y of the start and of the end, from the
            middle, in pixels of this map.
        """
        taps: list[Tensor] = []
        for index, layer in enumerate(self.backbone["features"].children()):
            x = layer(x)
            if index in TAPS:
                taps.append(x)
        y = self.block16(self.block15(taps[3], taps[4]))
        y = self.block18(self.block17(taps[2], y))
        y = self.block20(self.block19(taps[1], y))
        y = self.block23(self.block22(self.block21(taps[0], y)))
        return y[:, CENTRE : CENTRE + 1], y[:, DISPLACEMENT]


class Merge(nn.Module):
    """A fine map beside a coarse one, both brought to the same width and size."""

    def __init__(self, fine: int, coarse: int, width: int, *, enlarge: bool, anew: bool) -> None:
        super().__init__()
        self.conv1 = conv_relu(coarse, width, 1)
        self.conv2 = conv_relu(fine, width, 1)
        self.enlarge, self.anew = enlarge, anew

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """`(B, C, H, W)` and `(B, C', H/2, W/2)` or of the same size -> `(B, 2 width, H, W)`."""
        if self.enlarge and not self.anew:
            coarse = F.interpolate(coarse, scale_factor=2.0, mode="bilinear")
        coarse = self.conv1(coarse)
        if self.enlarge and self.anew:
            coarse = F.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=True)
        return torch.cat([self.conv2(fine), coarse], dim=1)


class Refine(nn.Module):
    """A residual convolution, and one that narrows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = conv_relu(inputs, inputs, 3)
        self.conv2 = conv_relu(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, C', H, W)`."""
        y: Tensor = self.conv2(self.conv1(x) + x)
        return y


class Predict(nn.Module):
    """A wide convolution, one more, and the maps."""

    def __init__(self, inputs: int, maps: int) -> None:
        super().__init__()
        self.conv1 = conv_relu(inputs, inputs, 3, dilation=5)
        self.conv2 = conv_relu(inputs, inputs, 3)
        self.conv3 = nn.Conv2d(inputs, maps, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, maps, H, W)`."""
        y: Tensor = self.conv3(self.conv2(self.conv1(x)))
        return y


def conv_relu(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """Convolution, (folded) batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation)
    return nn.Sequential(conv, nn.Identity(), nn.ReLU())
