"""IP-Adapters and image encoders with random weights, under their published names."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from reverie.nets.unet import UNet
from tests import tiny

SIZE = 28  # pixels of a side that the image encoder sees: four patches
ENCODER = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": SIZE, "patch_size": 14, "projection_dim": 48, "hidden_act": "gelu",
}  # fmt: skip


def image_encoder(**settings: Any) -> Any:
    """Of transformers; 64 channels of states, an embedding of 48."""
    torch.manual_seed(3)
    config = tiny.transformers.CLIPVisionConfig(**(ENCODER | settings))
    return tiny.transformers.CLIPVisionModelWithProjection(config).eval()


def picture(seed: int = 0, size: tuple[int, int] = (45, 33)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def _perceiver(start: str, source: int, inner: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "proj_in.weight": (inner, source), "proj_in.bias": (inner,), "proj_out.weight": (width, inner),
        "proj_out.bias": (width,), "norm_out.weight": (width,), "norm_out.bias": (width,),
    }  # fmt: skip
    for n in range(4):  # diffusers builds four whatever the file holds
        attention, feed = f"layers.{n}.0", f"layers.{n}.1"
        for norm in (f"{attention}.norm1", f"{attention}.norm2", f"{feed}.0"):
            shapes |= {f"{norm}.weight": (inner,), f"{norm}.bias": (inner,)}
        shapes |= {
            f"{attention}.to_q.weight": (128, inner), f"{attention}.to_kv.weight": (256, inner),
            f"{attention}.to_out.weight": (inner, 128), f"{feed}.1.weight": (4 * inner, inner),
            f"{feed}.3.weight": (inner, 4 * inner),
        }  # fmt: skip
    return {start + name: shape for name, shape in shapes.items()}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def projection(kind: str, width: int) -> dict[str, tuple[int, ...]]:
    """What stands under `image_proj.` in the published files, by the variant; names of tencent-ailab/IP-Adapter."""
    if kind == "plain":
        return {"proj.weight": (4 * width, 48), "proj.bias": (4 * width,)} | _norm("norm", width)
    if kind == "full":
        linear = {
            "proj.0.weight": (64, 64),
            "proj.0.bias": (64,),
            "proj.2.weight": (width, 64),
            "proj.2.bias": (width,),
        }
        return linear | _norm("proj.3", width)
    if kind == "plus":
        return {"latents": (1, 5, 40)} | _perceiver("", 64, 40, width)
    face = {
        "proj.0.weight": (1024, 512), "proj.0.bias": (1024,), "proj.2.weight": (4 * width, 1024),
        "proj.2.bias": (4 * width,),
    } | _norm("norm", width)  # fmt: skip
    return face if kind == "face" else face | _perceiver("perceiver_resampler.", 64, width, width)


def tensors(kind: str, unet: UNet, seed: int = 0, *, lora: bool = False) -> dict[str, Tensor]:
    """An IP-Adapter for a U-Net, flat as in a safetensors file.

    Args:
        kind: `plain`, `full`, `plus`, `face` or `face_plus`.
        lora: with FaceID's.
    """
    width = unet.config.context_width
    shapes = {f"image_proj.{name}": shape for name, shape in projection(kind, width).items()}
    # way down, way up, middle; two attention layers a block, the second looks at the prompt
    modules = dict(unet.named_modules())
    sides = [[p for p in modules if p.startswith(s) and p.endswith("attn1")] for s in ("down", "up", "mid")]
    for n, path in enumerate(path for side in sides for path in side):
        inner = modules[path].to_q.in_features
        shapes |= {f"ip_adapter.{2 * n + 1}.to_{part}_ip.weight": (inner, width) for part in "kv"}
        for at, source in ((2 * n, inner), (2 * n + 1, width)) if lora else ():
            for part, columns in (("q", inner), ("k", source), ("v", source), ("out", inner)):
                shapes[f"ip_adapter.{at}.to_{part}_lora.down.weight"] = (2, columns)
                shapes[f"ip_adapter.{at}.to_{part}_lora.up.weight"] = (inner, 2)
    generator = torch.Generator().manual_seed(seed)
    return {name: _filled(name, shape, generator) for name, shape in shapes.items()}


def _filled(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    numbers = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.3 * numbers if name.endswith("weight") else 0.3 * numbers
    return numbers / math.sqrt(shape[-1])


def file_of(folder: Path, name: str, found: dict[str, Tensor]) -> Path:
    """As safetensors, or nested in a torch file by the ending `.bin`."""
    path = folder / name
    if path.suffix == ".bin":
        nested: dict[str, dict[str, Tensor]] = {}
        for key, tensor in found.items():
            nested.setdefault(key.split(".")[0], {})[key.partition(".")[2]] = tensor
        torch.save(nested, path)
    else:
        save_file(found, path)
    return path
