"""Inception v3 as FID knows it (Szegedy et al. 2016; Heusel et al. 2017): TensorFlow's network of 2015.

It differs from the published PyTorch one: averages leave the padding out, and the last block takes a maximum.
Parameter names are those of pytorch-fid's weights; `from_tensorflow` knows the other published names.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 2048
SIZE = 299
EPS = 1e-3


class Conv(nn.Module):
    """Convolution without bias, batch norm without scale, ReLU."""

    def __init__(self, source: int, width: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(source, width, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, source, h, w)` -> `(B, width, h', w')`."""
        return F.relu(self.bn(self.conv(x)))


def average(x: Tensor) -> Tensor:
    """The mean of 3x3 neighbours, those outside left out."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class InceptionA(nn.Module):
    """1x1, 5x5, twice 3x3, and an average (figure 5)."""

    def __init__(self, source: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(source, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(source, 48, 1), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = (
            Conv(source, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3),
        )  # fmt: skip
        self.branch_pool = Conv(source, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, source, h, w)` -> `(B, 224 + pooled, h, w)`."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        parts = (self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(average(x)))
        return torch.cat(parts, 1)


class InceptionB(nn.Module):
    """Half the size: 3x3, twice 3x3, and a maximum."""

    def __init__(self, source: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(source, 384, 3, 2, pad=False)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(source, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, source, h, w)` -> `(B, 480 + source, h / 2, w / 2)`."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch3x3(x), double, F.max_pool2d(x, 3, 2)), 1)


class InceptionC(nn.Module):
    """7x7 in two halves, once and twice (figure 6)."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        across, down = (1, 7), (7, 1)
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(768, inner, 1), Conv(inner, inner, across)
        self.branch7x7_3 = Conv(inner, 192, down)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(768, inner, 1), Conv(inner, inner, down)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(inner, inner, across), Conv(inner, inner, down)
        self.branch7x7dbl_5 = Conv(inner, 192, across)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 768, h, w)` -> `(B, 768, h, w)`."""
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat((self.branch1x1(x), once, twice, self.branch_pool(average(x))), 1)


class InceptionD(nn.Module):
    """Half the size: 3x3, 7x7 and 3x3, and a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192, 1), Conv(192, 320, 3, 2, pad=False)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192, 1), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, 3, 2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 768, h, w)` -> `(B, 1280, h / 2, w / 2)`."""
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat((self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, 2)), 1)


class InceptionE(nn.Module):
    """3x3 spread out, once and after another (figure 7); `last` takes a maximum where the other averages."""

    def __init__(self, source: int, *, last: bool) -> None:
        super().__init__()
        self.last = last
        self.branch1x1 = Conv(source, 320, 1)
        self.branch3x3_1 = Conv(source, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(source, 448, 1), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.branch_pool = Conv(source, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, source, h, w)` -> `(B, 2048, h, w)`."""
        once, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.last else average(x)
        parts = (
            self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once), self.branch3x3dbl_3a(twice),
            self.branch3x3dbl_3b(twice), self.branch_pool(pooled),
        )  # fmt: skip
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """Pictures -> the features that FID, KID, precision and recall compare."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2, pad=False), Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1, pad=False), Conv(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = InceptionA(192, 32), InceptionA(256, 64), InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b, self.Mixed_6c = InceptionC(128), InceptionC(160)
        self.Mixed_6d, self.Mixed_6e = InceptionC(160), InceptionC(192)
        self.Mixed_7a = InceptionD()
        self.Mixed_7b, self.Mixed_7c = InceptionE(1280, last=False), InceptionE(2048, last=True)

    def forward(self, pictures: Tensor) -> Tensor:
        """Features of pictures.

        Args:
            pictures: `(B, 3, H, W)` in [0, 1], resized to 299x299 with the bilinear rule of pytorch-fid.

        Returns:
            `(B, 2048)`.
        """
        x = F.interpolate(pictures, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        return self.features(2 * x - 1)

    def features(self, x: Tensor) -> Tensor:
        """`(B, 3, 299, 299)` in [-1, 1] -> `(B, 2048)`."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


STEM = {"conv": "Conv2d_1a_3x3", "conv_1": "Conv2d_2a_3x3", "conv_2": "Conv2d_2b_3x3", "conv_3": "Conv2d_3b_1x1",
        "conv_4": "Conv2d_4a_3x3"}  # fmt: skip
BLOCKS = dict(enumerate(("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")))
BRANCHES: dict[str, dict[str, str]] = {
    "A": {"conv": "branch1x1", "tower.conv": "branch5x5_1", "tower.conv_1": "branch5x5_2",
          "tower_1.conv": "branch3x3dbl_1", "tower_1.conv_1": "branch3x3dbl_2", "tower_1.conv_2": "branch3x3dbl_3",
          "tower_2.conv": "branch_pool"},
    "B": {"conv": "branch3x3", "tower.conv": "branch3x3dbl_1", "tower.conv_1": "branch3x3dbl_2",
          "tower.conv_2": "branch3x3dbl_3"},
    "C": {"conv": "branch1x1", "tower.conv": "branch7x7_1", "tower.conv_1": "branch7x7_2",
          "tower.conv_2": "branch7x7_3", "tower_1.conv": "branch7x7dbl_1", "tower_1.conv_1": "branch7x7dbl_2",
          "tower_1.conv_2": "branch7x7dbl_3", "tower_1.conv_3": "branch7x7dbl_4", "tower_1.conv_4": "branch7x7dbl_5",
          "tower_2.conv": "branch_pool"},
    "D": {"tower.conv": "branch3x3_1", "tower.conv_1": "branch3x3_2", "tower_1.conv": "branch7x7x3_1",
          "tower_1.conv_1": "branch7x7x3_2", "tower_1.conv_2": "branch7x7x3_3", "tower_1.conv_3": "branch7x7x3_4"},
    "E": {"conv": "branch1x1", "tower_conv": "branch3x3_1", "tower_mixed_conv": "branch3x3_2a",
          "tower_mixed_conv_1": "branch3x3_2b", "tower_1_conv": "branch3x3dbl_1", "tower_1_conv_1": "branch3x3dbl_2",
          "tower_1_mixed_conv": "branch3x3dbl_3a", "tower_1_mixed_conv_1": "branch3x3dbl_3b",
          "tower_2_conv": "branch_pool"},
}  # fmt: skip
LEAVES = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
KINDS = "AAABCCCCDEE"
NAME = re.compile(r"(?:net\.)?layers\.(?:(conv(?:_\d)?)|mixed(?:_(\d+))?\.(.+))\.(weight|beta|mean|var)")


def from_tensorflow(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of TensorFlow's graph (`layers.mixed_10.tower_2_conv.weight`) under ours.

    Raises:
        KeyError: a name that the network does not have.
    """
    found = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise KeyError(name)
        stem, block, branch, leaf = match.groups()
        place = int(block or 0)
        path = STEM[stem] if stem else f"Mixed_{BLOCKS[place]}.{BRANCHES[KINDS[place]][branch]}"
        found[f"{path}.{LEAVES[leaf]}"] = tensor
        if leaf == "beta":
            found[f"{path}.bn.weight"] = torch.ones_like(tensor)
    return found
