"""The whole way, small: an autoencoder, then a text encoder and a U-Net on its latents, then pictures for captions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import reverie
from reverie.engine.sources import to_tensor
from reverie.nets.autoencoder import Autoencoder
from tests.train import toy

STEPS = 300
CAPTIONS = [f"a {colour} {shape}" for shape in ("square", "disc") for colour in toy.COLOURS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a model was trained, and where one was exported that was not trained at all."""
    root = tmp_path_factory.mktemp("learning")
    run = toy.autoencoder_run(root, steps=400, batch=8, learning_rate=2e-2, ema=0.98)
    plainly = run.loss.model_copy(update={"square": 10.0, "gradient": 0.0})  # colours first
    toy.trained(run.model_copy(update={"loss": plainly}))
    vae = root / "vae" / "export" / "vae"
    for out, until in (("model", STEPS), ("untrained", 0)):
        settings = {"steps": STEPS, "batch": 16, "ema": 0.98, "learning_rate": 4e-3}
        toy.trained(toy.diffusion_run(root, vae, out, **settings), until)
    return root


def drawn(model: Path) -> Tensor:
    loaded = reverie.load(model)
    pictures = [loaded.generate(caption, seed=1, steps=10, guidance_scale=1.5).images[0] for caption in CAPTIONS]
    return torch.cat([to_tensor(picture) for picture in pictures])


def test_the_loss_falls(folder: Path) -> None:
    losses = [json.loads(line)["loss"] for line in (folder / "model" / "log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-20:]) < 0.3 * np.mean(losses[:20])


def test_a_picture_is_what_its_caption_says(folder: Path) -> None:
    """Far nearer to its drawing than an untrained model's; nearer than to any other, as the autoencoder has them."""
    truth = torch.from_numpy(np.load(folder / "data" / "pictures.npy")).permute(0, 3, 1, 2).float() / 255
    trained, untrained = (drawn(folder / name / "export") for name in ("model", "untrained"))
    assert (_errors(trained, truth) < 0.5 * _errors(untrained, truth)).all()
    vae = reverie.load(folder / "model" / "export").network("vae")
    assert isinstance(vae, Autoencoder)
    kept = (vae.decode(vae.encode(truth * 2 - 1)[0]) + 1) / 2
    assert _errors(trained[:, None], kept).argmin(1).tolist() == list(range(len(CAPTIONS)))


def _errors(pictures: Tensor, others: Tensor) -> Tensor:
    return (pictures - others).square().mean((-3, -2, -1))
