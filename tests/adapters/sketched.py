"""T2I-Adapters and style adapters with random weights."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests import tiny

# A light adapter repeats its last width. The U-Nets are `tests.tiny`'s: sd1 has a last level without attention.
WIDTHS = {"full_adapter": [32, 64, 64], "light_adapter": [32, 64], "full_adapter_xl": [32, 64, 128, 128]}
FACTORS = {"full_adapter": 4, "light_adapter": 4, "full_adapter_xl": 8}  # the tiny VAE makes 4 pixels a latent


FAMILY = {"full_adapter": "tiny-sd", "light_adapter": "tiny-sd", "full_adapter_xl": "ssd-1b"}


def adapter(kind: str, channels: int = 3, seed: int = 0, widths: list[int] | None = None) -> Any:
    """Of diffusers, for the tiny models."""
    torch.manual_seed(seed)
    network = tiny.diffusers.T2IAdapter(
        in_channels=channels, channels=widths or WIDTHS[kind], num_res_blocks=2,
        downscale_factor=FACTORS[kind], adapter_type=kind,
    ).eval()  # fmt: skip
    for parameter in network.parameters():
        parameter.data *= 3  # features as large as the U-Net's own
    return network


def original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """TencentARC's names: `ldm/modules/encoders/adapter.py`, where blocks of all levels stand in one row."""
    light = any("out_conv" in name for name in tensors)

    def renamed(name: str) -> str:
        name = name.removeprefix("adapter.")
        if light:
            return name.replace(".resnets.", ".body.")
        name = re.sub(r"body\.(\d+)\.in_conv", lambda m: f"body.{2 * int(m[1])}.in_conv", name)
        return re.sub(r"body\.(\d+)\.resnets\.(\d+)", lambda m: f"body.{2 * int(m[1]) + int(m[2])}", name)

    return {renamed(name): t for name, t in tensors.items()}


def style(width: int, source: int = 64, tokens: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """A style adapter with random weights under TencentARC's names, two layers."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"style_embedding": (1, tokens, source), "proj": (source, width)}
    layers = [f"transformer_layes.{n}" for n in range(2)]
    for layer in layers:
        shapes |= {
            f"{layer}.attn.in_proj_weight": (3 * source, source), f"{layer}.attn.in_proj_bias": (3 * source,),
            f"{layer}.attn.out_proj.weight": (source, source), f"{layer}.attn.out_proj.bias": (source,),
            f"{layer}.mlp.c_fc.weight": (4 * source, source), f"{layer}.mlp.c_fc.bias": (4 * source,),
            f"{layer}.mlp.c_proj.weight": (source, 4 * source), f"{layer}.mlp.c_proj.bias": (source,),
        }  # fmt: skip
    for norm in ("ln_pre", "ln_post", *(f"{layer}.ln_{n}" for layer in layers for n in (1, 2))):
        shapes |= {f"{norm}.weight": (source,), f"{norm}.bias": (source,)}
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
