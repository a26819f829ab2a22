"""HED: soft edges at five scales (Xie & Tu 2015, "Holistically-Nested Edge Detection")."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions of VGG16 (section 3)


class Hed(nn.Module):
    """VGG16 with a side output after each of its five stages, and their weighted sum.

    Names are those of ControlNet 1.1's `ControlNetHED.pth`; `fuse` is its mean of the side outputs, which the
    original network learns.

    Args:
        stages: channels and number of convolutions of each stage.
    """

    def __init__(self, stages: tuple[tuple[int, int], ...] = STAGES) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        width = 3
        for index, (channels, convolutions) in enumerate(stages, 1):
            self.add_module(f"block{index}", Stage(width, channels, convolutions))
            width = channels
        self.fuse = nn.Conv2d(len(stages), 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, 3, H, W)`, RGB in 0..255 -> `(B, 1, H, W)` logits of an edge."""
        size = x.shape[-2:]
        x = x - self.norm
        sides: list[Tensor] = []
        for index in range(1, self.fuse.in_channels + 1):
            x, side = self.get_submodule(f"block{index}")(F.max_pool2d(x, 2, ceil_mode=True) if index > 1 else x)
            sides.append(F.interpolate(side, size=size, mode="bilinear"))
        fused: Tensor = self.fuse(torch.cat(sides, dim=1))
        return fused


class Stage(nn.Module):
    """Convolutions of one width, and what they say of edges."""

    def __init__(self, inputs: int, channels: int, convolutions: int) -> None:
        super().__init__()
        widths = [inputs] + [channels] * convolutions
        self.convs = nn.ModuleList(nn.Conv2d(before, channels, 3, padding=1) for before in widths[:-1])
        self.projection = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, C, H, W)` -> `(B, C', H, W)` and `(B, 1, H, W)`."""
        for conv in self.convs:
            x = conv(x).relu()
        return x, self.projection(x)
