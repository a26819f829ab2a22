"""Depth Anything V2: how near every pixel is (Yang et al. 2024), by DINOv2 and the DPT decoder (Ranftl et al. 2021).

Names are those of transformers' layout (`depth-anything/Depth-Anything-V2-Small-hf`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 64  # channels of an attention head in DINOv2 of every size (Oquab et al. 2023, table 17)
# Blocks whose answers the decoder sees, by how many there are (Depth Anything V2, `intermediate_layer_idx`).
TAPS = {12: (3, 6, 9, 12), 24: (5, 12, 18, 24)}


@dataclass(frozen=True)
class DepthAnythingConfig:
    """The shape of a network; the defaults are V2-Small's.

    Attributes:
        hidden: channels of the transformer.
        heads: of its attention.
        layers: blocks.
        taps: after how many blocks an answer goes to the decoder, four times.
        positions: learned positions along a side.
        patch: pixels along a side of a patch.
        neck: channels of the four answers in the decoder, the finest first.
        fusion: channels in which they are joined.
        head: channels before the last convolution.
    """

    hidden: int = 384
    heads: int = 6
    layers: int = 12
    taps: tuple[int, ...] = TAPS[12]
    positions: int = 37
    patch: int = 14
    neck: tuple[int, ...] = (48, 96, 192, 384)
    fusion: int = 64
    head: int = 32


def config_of(shapes: Mapping[str, Sequence[int]]) -> DepthAnythingConfig:
    """The config that tensors of these names and shapes belong to.

    Raises:
        KeyError, ValueError: not this network.
    """
    layers = len({name.split(".")[3] for name in shapes if name.startswith("backbone.encoder.layer.")})
    if layers not in TAPS:
        raise ValueError(f"{layers} blocks; Depth Anything has {' or '.join(map(str, TAPS))}")
    hidden, _, patch, _ = shapes["backbone.embeddings.patch_embeddings.projection.weight"]
    positions = shapes["backbone.embeddings.position_embeddings"][1] - 1
    neck = tuple(shapes[f"neck.reassemble_stage.layers.{i}.projection.weight"][0] for i in range(4))
    return DepthAnythingConfig(
        hidden, hidden // HEAD, layers, TAPS[layers], round(positions**0.5), patch, neck,
        shapes["neck.convs.0.weight"][0], shapes["head.conv2.weight"][0],
    )  # fmt: skip


class DepthAnything(nn.Module):
    """DINOv2, the decoder, and the head."""

    def __init__(self, config: DepthAnythingConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DepthAnythingConfig()
        self.backbone = Backbone(config)
        self.neck = Neck(config)
        self.head = Head(config)

    def forward(self, x: Tensor) -> Tensor:
        """Inverse depth, up to scale and shift: larger is nearer.

        Args:
            x: `(B, 3, H, W)`, sides multiples of the patch; RGB, ImageNet's mean and standard deviation taken out.

        Returns:
            `(B, H, W)`, not negative.
        """
        height, width = x.shape[-2:]
        if height % self.config.patch or width % self.config.patch:
            raise ValueError(f"The picture is {width}x{height}; sides must be multiples of {self.config.patch}.")
        depth: Tensor = self.head(self.neck(self.backbone(x)), (height, width))
        return depth


class Backbone(nn.Module):
    """DINOv2, a vision transformer; its answers after some blocks, as pictures of patches."""

    def __init__(self, config: DepthAnythingConfig) -> None:
        super().__init__()
        self.taps = config.taps
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Block(config) for _ in range(config.layers))})
        self.layernorm = nn.LayerNorm(config.hidden, eps=1e-6)

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(B, 3, H, W)` -> four of `(B, hidden, H/14, W/14)`."""
        tokens, size = self.embeddings(x)
        answers: list[Tensor] = []
        for index, block in enumerate(self.encoder["layer"].children(), 1):
            tokens = block(tokens)
            if index in self.taps:
                answers.append(self.layernorm(tokens)[:, 1:].transpose(1, 2).reshape(len(x), -1, *size))
        return answers


class Embeddings(nn.Module):
    """Patches as tokens, one more for the whole, and where each is."""

    def __init__(self, config: DepthAnythingConfig) -> None:
        super().__init__()
        self.side = config.positions
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.positions**2 + 1, config.hidden))
        projection = nn.Conv2d(3, config.hidden, config.patch, config.patch)
        self.patch_embeddings = nn.ModuleDict({"projection": projection})

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """`(B, 3, H, W)` -> `(B, 1 + h w, hidden)`, and h and w."""
        patches = self.patch_embeddings["projection"](x)
        size = (int(patches.shape[2]), int(patches.shape[3]))
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        return tokens + self._positions(size), size

    def _positions(self, size: tuple[int, int]) -> Tensor:
        """Learned for a square; bicubically resized for any other picture."""
        if size == (self.side, self.side):
            return self.position_embeddings
        whole, grid = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        grid = grid.transpose(1, 2).reshape(1, -1, self.side, self.side)
        grid = F.interpolate(grid, size=size, mode="bicubic")
        return torch.cat([whole, grid.flatten(2).transpose(1, 2)], dim=1)


class Block(nn.Module):
    """Attention and a perceptron, each scaled by channel (Touvron et al. 2021, LayerScale)."""

    def __init__(self, config: DepthAnythingConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.norm1 = nn.LayerNorm(hidden, eps=1e-6)
        self.attention = Attention(hidden, config.heads)
        self.layer_scale1 = LayerScale(hidden)
        self.norm2 = nn.LayerNorm(hidden, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(hidden, 4 * hidden), "fc2": nn.Linear(4 * hidden, hidden)})
        self.layer_scale2 = LayerScale(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, n, hidden)` -> the same shape."""
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        wide = F.gelu(self.mlp["fc1"](self.norm2(x)))
        y: Tensor = x + self.layer_scale2(self.mlp["fc2"](wide))
        return y


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, n, hidden)` -> the same shape."""
        return x * self.lambda1


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict({name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, hidden)})

    def forward(self, x: Tensor) -> Tensor:
        """`(B, n, hidden)` -> the same shape."""
        batch, length, _ = x.shape
        q, k, v = (
            self.attention[name](x).reshape(batch, length, self.heads, -1).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.output["dense"](y)
        return out


class Neck(nn.Module):
    """The four answers at 4, 2, 1 and 1/2 times their size, joined from the coarsest to the finest."""

    def __init__(self, config: DepthAnythingConfig) -> None:
        super().__init__()
        layers = nn.ModuleList(Reassemble(config.hidden, c, i) for i, c in enumerate(config.neck))
        self.reassemble_stage = nn.ModuleDict({"layers": layers})
        self.convs = nn.ModuleList(nn.Conv2d(c, config.fusion, 3, padding=1, bias=False) for c in config.neck)
        self.fusion_stage = nn.ModuleDict({"layers": nn.ModuleList(Fusion(config.fusion) for _ in config.neck)})

    def forward(self, answers: Sequence[Tensor]) -> Tensor:
        """Four of `(B, hidden, h, w)` -> `(B, fusion, 8h, 8w)`."""
        layers = self.reassemble_stage["layers"].children()
        maps = [conv(layer(x)) for conv, layer, x in zip(self.convs, layers, answers, strict=True)][::-1]
        joined: Tensor | None = None
        for index, (fuse, x) in enumerate(zip(self.fusion_stage["layers"].children(), maps, strict=True)):
            last = index + 1 == len(maps)
            size = (2 * x.shape[2], 2 * x.shape[3]) if last else maps[index + 1].shape[2:]
            joined = fuse(x, joined, size)
        if joined is None:
            raise ValueError("The decoder needs at least one answer.")
        return joined


class Reassemble(nn.Module):
    """One answer in the decoder's channels and size."""

    def __init__(self, hidden: int, channels: int, level: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(hidden, channels, 1)
        resizes = (
            lambda: nn.ConvTranspose2d(channels, channels, 4, 4),
            lambda: nn.ConvTranspose2d(channels, channels, 2, 2),
            nn.Identity,
            lambda: nn.Conv2d(channels, channels, 3, 2, 1),
        )
        self.resize: nn.Module = resizes[level]()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, hidden, h, w)` -> `(B, channels, f h, f w)`."""
        y: Tensor = self.resize(self.projection(x))
        return y


class Fusion(nn.Module):
    """What was joined so far, and a finer map, at the next size (RefineNet's fusion block)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(width, width, 1)
        self.residual_layer1 = PreActivation(width)
        self.residual_layer2 = PreActivation(width)

    def forward(self, x: Tensor, joined: Tensor | None, size: Sequence[int]) -> Tensor:
        """`x (B, width, h, w)` -> `(B, width, *size)`."""
        x = x if joined is None else joined + self.residual_layer1(x)
        x = F.interpolate(self.residual_layer2(x), size=tuple(size), mode="bilinear", align_corners=True)
        y: Tensor = self.projection(x)
        return y


class PreActivation(nn.Module):
    """Two convolutions, each after a ReLU, added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(width, width, 3, padding=1)
        self.convolution2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, width, h, w)` -> the same shape."""
        y: Tensor = x + self.convolution2(self.convolution1(x.relu()).relu())
        return y


class Head(nn.Module):
    """One channel at the size of the picture."""

    def __init__(self, config: DepthAnythingConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(config.fusion, config.fusion // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(config.fusion // 2, config.head, 3, padding=1)
        self.conv3 = nn.Conv2d(config.head, 1, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """`(B, fusion, h, w)` -> `(B, *size)`."""
        x = F.interpolate(self.conv1(x), size=size, mode="bilinear", align_corners=True)
        depth: Tensor = self.conv3(self.conv2(x).relu()).relu()
        return depth.squeeze(1)
