"""A tiny judge, a tiny world, and a tiny model that draws in it."""

from pathlib import Path
from typing import Any

import torch

from reverie.nets.judge import NO_COLOUR, Judge, JudgeConfig
from reverie.train.scenes.colours import COLOURS
from tests.train.scenes.world import STYLES, THINGS, write_world

__all__ = ["diffusion_config", "judge", "write_world"]

SIZE = 32


def judge(concepts: tuple[str, ...] = tuple(THINGS), seed: int = 0) -> Judge:
    """One that knows nothing yet."""
    torch.manual_seed(seed)
    names: dict[str, Any] = {"concepts": concepts, "styles": STYLES, "colours": (NO_COLOUR, *COLOURS)}
    return Judge(JudgeConfig(**names, size=SIZE, finder=(8, 8, 8), namer=(8, 8, 8), hidden=16)).eval()


def diffusion_config(path: Path, sprites: Path, **data: Any) -> Path:
    """What a model of this world could have been trained by."""
    lines = [f"{key} = {value!r}".replace("'", '"') for key, value in data.items()]
    path.write_text(
        f"""
autoencoder = "vae"
tokenizer = "tokenizer"
[data]
kind = "scenes"
path = "{sprites}"
size = {SIZE}
{chr(10).join(lines)}
[loop]
out = "out"
steps = 1
batch = 1
learning_rate = 0.001
[model]
block_out_channels = [8]
attention = [false]
text_width = 8
text_layers = 1
""",
        encoding="utf-8",
    )
    return path
