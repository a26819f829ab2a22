"""A picture as a line drawing.

Chan et al. 2022, "Learning to Generate Line Drawings that Convey Geometry and Semantics": the generator of Johnson et
al. 2016 with instance norms. Names are those of the published `sk_model.pth`.
"""

from torch import Tensor, nn

FACTOR = 4  # by which the inner layers are smaller: sides must be multiples of it


class LineDrawing(nn.Module):
    """Two halvings, residual blocks, two doublings.

    Args:
        width: channels at the picture's size.
        blocks: residual blocks.
    """

    def __init__(self, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        self.model0 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), nn.InstanceNorm2d(width), nn.ReLU())
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for wide in (width, 2 * width):
            down += [nn.Conv2d(wide, 2 * wide, 3, 2, 1), nn.InstanceNorm2d(2 * wide), nn.ReLU()]
            enlarge = nn.ConvTranspose2d(2 * wide, wide, 3, 2, 1, output_padding=1)
            up = [enlarge, nn.InstanceNorm2d(wide), nn.ReLU(), *up]
        self.model1 = nn.Sequential(*down)
        self.model2 = nn.Sequential(*(Residual(4 * width) for _ in range(blocks)))
        self.model3 = nn.Sequential(*up)
        self.model4 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(width, 1, 7), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, 3, H, W)`, RGB in [0, 1], sides multiples of 4 -> `(B, 1, H, W)`, 0 on lines and 1 on paper."""
        y: Tensor = self.model4(self.model3(self.model2(self.model1(self.model0(x)))))
        return y


class Residual(nn.Module):
    """Two convolutions, added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> the same shape."""
        y: Tensor = x + self.conv_block(x)
        return y
