"""The named post-step that enlarges a finished picture."""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.checkpoint.load import build
from reverie.checkpoint.source import open_weights
from reverie.nets.upscaler import CompactUpscaler, UpscalerConfig
from reverie.registry import Registry

UPSCALERS = Registry[Path]("upscaler")
UPSCALERS.add(
    "realesr-animevideov3-x4",
    Path(__file__).parent.parent / "models" / "upscaler" / "realesr-animevideov3-x4.safetensors",
)


@torch.no_grad()
def upscale(pixels: Tensor, name: str) -> Tensor:
    """Enlarge pictures `(B, 3, H, W)` in [0, 1].

    The network shifts colours a little; one step of back-projection (Irani & Peleg 1991) puts back the difference
    between its result, reduced again, and what it was given. Returns `(B, 3, scale * H, scale * W)` in [0, 1].
    """
    network = _network(UPSCALERS.name(name), pixels.device)
    scale = network.config.scale
    large = network(pixels)
    error = pixels - F.avg_pool2d(large, scale)
    correction = F.interpolate(error, scale_factor=float(scale), mode="bicubic")
    result: Tensor = (large + correction).clamp(0, 1)
    return result


@cache
def _network(name: str, device: torch.device) -> CompactUpscaler:
    path = UPSCALERS[name]
    file = open_weights(path)
    tensors = {key: file.tensor(key).float() for key in file.tensors}
    return build(lambda: CompactUpscaler(UpscalerConfig()), tensors, f"the upscaler {path}").to(device)
