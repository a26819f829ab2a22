"""Files of weights of every learned preprocessor's network, with random values."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from reverie.checkpoint.save import write_weights
from reverie.control.weights import WEIGHTS
from reverie.nets.deeplab import DeepLab
from reverie.nets.depth_anything import DepthAnything, DepthAnythingConfig
from reverie.nets.hed import Hed
from reverie.nets.line_drawing import LineDrawing
from reverie.nets.mlsd import Mlsd
from reverie.nets.openpose_light import OpenPoseLight
from reverie.nets.upernet import UperNet, UperNetConfig

# Of true size, but those whose config is read from the file.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "hed": Hed,
    "mlsd": Mlsd,
    "line_drawing": LineDrawing,
    "openpose_light": OpenPoseLight,
    "deeplab": DeepLab,
    "upernet": lambda: UperNet(UperNetConfig((6, 8, 10, 12), (1, 1, 1, 1), 8, 150)),
    "depth_anything": lambda: DepthAnything(
        DepthAnythingConfig(hidden=64, heads=1, positions=5, neck=(4, 6, 8, 10), fusion=6, head=5)
    ),
}


def write_all(folder: Path) -> None:
    """Every file that `WEIGHTS` names, in half precision."""
    noise = torch.randn(65_521, generator=torch.Generator().manual_seed(0))  # a prime: repeats never line up
    for name, make in NETWORKS.items():
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in make().state_dict().items()}
        tensors = {}
        for key, shape in shapes.items():
            scale = math.sqrt(2 / shape[1:].numel()) if len(shape) > 1 else 0.1
            values = noise.repeat(shape.numel() // len(noise) + 1)[: shape.numel()]
            tensors[key] = (values * scale).half().reshape(shape)
        write_weights(folder / WEIGHTS[name].file, tensors)
