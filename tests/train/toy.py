"""Eight drawn shapes with captions, and configurations that train on them in a second."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reverie.train.config import AutoencoderRun, DiffusionRun
from reverie.train.loop import Report, Trainer
from reverie.train.methods import AutoencoderMethod, DiffusionMethod
from tests.vocabulary import tokenizer_folder

SIZE = 16
CPU = torch.device("cpu")
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}


def data(folder: Path) -> Path:
    """A square and a disc in each of four colours; written once, as other processes may be reading them."""
    if (folder / "captions.jsonl").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    masks = {"square": np.maximum(abs(x), abs(y)) < 5, "disc": np.hypot(x, y) < 5}
    pictures, rows = [], []
    for shape, mask in masks.items():
        for name, colour in COLOURS.items():
            pictures.append(np.where(mask[..., None], np.array(colour), 255))
            rows.append({"captions": [f"a {name} {shape}", f"{shape}, {name}"], "shape": shape})
    np.save(folder / "pictures.npy", np.stack(pictures).astype(np.uint8))
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def loop(out: Path, **settings: Any) -> dict[str, Any]:
    return {"out": out, "steps": 8, "batch": 4, "learning_rate": 3e-3, "warmup": 2, "seed": 1} | settings


def autoencoder_run(root: Path, out: str = "vae", **settings: Any) -> AutoencoderRun:
    return AutoencoderRun.model_validate(
        {
            "data": {"folder": data(root / "data")},
            "loop": loop(root / out, **settings),
            "model": {"block_out_channels": (8, 16), "groups": 4},
        }
    )


def diffusion_run(root: Path, autoencoder: Path, out: str = "model", **settings: Any) -> DiffusionRun:
    return DiffusionRun.model_validate(
        {
            "data": {"folder": data(root / "data")},
            "loop": loop(root / out, **settings),
            "model": {"block_out_channels": (16, 32), "attention": (True, False), "heads": 2, "groups": 8,
                      "text_width": 16, "text_layers": 1, "text_heads": 2, "text_positions": 12},
            "autoencoder": autoencoder,
            "tokenizer": tokenizer_folder(root / "tokenizer", merges_kept=200),
            "defaults": {"steps": 4, "width": SIZE, "height": SIZE},
        }
    )  # fmt: skip


def silent(step: int, numbers: dict[str, float]) -> None:
    """No report."""


def trained(run: AutoencoderRun | DiffusionRun, until: int | None = None, report: Report = silent) -> Trainer:
    """A new trainer, as a new process would make it, run to its end or to `until`."""
    torch.manual_seed(torch.seed())  # a new process has another state of the global generator
    method = AutoencoderMethod(run, CPU) if isinstance(run, AutoencoderRun) else DiffusionMethod(run, CPU)
    trainer = Trainer(method, run.loop)
    trainer.run(report, until)
    return trainer


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that training goes on from."""
    tensors = {f"network.{k}": v for k, v in trainer.method.network.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in trainer.ema.shadow.items()}
    for index, values in trainer.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{k}": v for k, v in values.items()}
    return tensors


def log(trainer: Trainer) -> list[dict[str, float]]:
    """The log without the times."""
    lines = (trainer.config.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
