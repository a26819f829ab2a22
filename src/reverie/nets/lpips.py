"""How unlike two pictures look: learned perceptual image patch similarity (LPIPS; Zhang et al. 2018, equation 1).

Features of a network that was trained to name pictures (AlexNet or VGG16), five layers of it, each normalised over its
channels; squared differences, weighted by channel as people judged. Parameter names are those of the two published
files: torchvision's `features.N` and the authors' `linN.model.1`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EPSILON = 1e-10  # added to the length of features; lpips/__init__.py, normalize_tensor
# Mean and deviation of ImageNet's colours, for pixels in [-1, 1]; lpips/lpips.py, ScalingLayer.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class Backbone:
    """Layers of a network for features, as torchvision numbers them.

    Attributes:
        layers: what each module is: a convolution `(width, kernel, stride, padding)`, `relu`, or a maximum over
            `(kernel, stride)`.
        taken: the modules whose answers are compared.
    """

    layers: tuple[tuple[int, ...] | str, ...]
    taken: tuple[int, ...]


def _vgg(*counts: int) -> tuple[tuple[int, ...] | str, ...]:
    layers: list[tuple[int, ...] | str] = []
    for width, count in zip((64, 128, 256, 512, 512), counts, strict=True):
        for _ in range(count):
            layers += [(width, 3, 1, 1), "relu"]
        layers.append((2, 2))
    return tuple(layers[:-1])


ALEXNET = Backbone(
    ((64, 11, 4, 2), "relu", (3, 2), (192, 5, 1, 2), "relu", (3, 2), (384, 3, 1, 1), "relu", (256, 3, 1, 1), "relu",
     (256, 3, 1, 1), "relu"), (1, 4, 7, 9, 11),
)  # fmt: skip
VGG16 = Backbone(_vgg(2, 2, 3, 3, 3), (3, 8, 15, 22, 29))


class Lpips(nn.Module):
    """The distance of two pictures, 0 for the same."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.taken = backbone.taken
        modules, width, widths = list[nn.Module](), 3, list[int]()
        for layer in backbone.layers:
            if layer == "relu":
                modules.append(nn.ReLU())
            elif len(layer) == 2:
                modules.append(nn.MaxPool2d(int(layer[0]), int(layer[1])))
            else:
                new, kernel, stride, padding = map(int, layer)
                modules.append(nn.Conv2d(width, new, kernel, stride, padding))
                width = new
            widths.append(width)
        self.features = nn.Sequential(*modules)
        self.lin = nn.ModuleList(nn.Conv2d(widths[place], 1, 1, bias=False) for place in self.taken)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Pictures `(B, 3, H, W)` in [0, 1] -> `(B,)`."""
        pairs = zip(self._seen(a), self._seen(b), self.lin, strict=True)
        return torch.stack([lin((x - y) ** 2).mean((1, 2, 3)) for x, y, lin in pairs]).sum(0)

    def _seen(self, pictures: Tensor) -> list[Tensor]:
        shift, scale = (pictures.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
        x, found = (2 * pictures - 1 - shift) / scale, []
        for i, module in enumerate(self.features):
            x = module(x)
            if i in self.taken:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + EPSILON))
        return found


def named(backbone: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the two published files under the names of `Lpips`; what names pictures is left out."""
    features = {name: t for name, t in backbone.items() if not name.startswith("classifier.")}
    return features | {name.replace("lin", "lin.").replace(".model.1", ""): t for name, t in heads.items()}
