"""DeepLabv3 on MobileNetV2: the class of every pixel (Chen et al. 2017; Sandler et al. 2018, section 6.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.nets.mobilenet import features

# Expansion, channels, blocks, stride, dilation: table 2 of Sandler et al., output stride 8 by dilation.
STAGES = (
    (1, 16, 1, 1, 1), (6, 24, 2, 2, 1), (6, 32, 3, 2, 1), (6, 64, 4, 1, 2), (6, 96, 3, 1, 2), (6, 160, 3, 1, 4),
    (6, 320, 1, 1, 4),
)  # fmt: skip
WIDTH, CLASSES = 256, 21


class DeepLab(nn.Module):
    """The backbone, the mean of the whole picture beside every place, and the classes.

    Args:
        stages: of the backbone.
        width: channels of the head.
        classes: 21 for Pascal VOC: the background and 20 things.
    """

    def __init__(
        self, stages: tuple[tuple[int, int, int, int, int], ...] = STAGES, width: int = WIDTH, classes: int = CLASSES
    ) -> None:
        super().__init__()
        self.features = features(3, 32, stages)
        channels = stages[-1][1]
        self.image_pooling = nn.Conv2d(channels, width, 1)
        self.aspp0 = nn.Conv2d(channels, width, 1)
        self.concat_projection = nn.Conv2d(2 * width, width, 1)
        self.logits = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, 3, H, W)`, RGB in [-1, 1] -> `(B, classes, H/8, W/8)`, sides rounded up."""
        x = self.features(x)
        mean = self.image_pooling(x.mean(dim=(2, 3), keepdim=True)).relu().expand(-1, -1, *x.shape[-2:])
        x = torch.cat([mean, self.aspp0(x).relu()], dim=1)
        logits: Tensor = self.logits(self.concat_projection(x).relu())
        return logits


def classes_at(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The likeliest class at every pixel `(B, H, W)`, of logits enlarged bilinearly, corner on corner."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True).argmax(dim=1)
