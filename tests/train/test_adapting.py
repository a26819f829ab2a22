"""Adapters trained on a toy model: the loss falls, the model stays as it is, what is exported is opened and acts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from reverie.adapters.control_files import open_control
from reverie.adapters.lora import open_adapter
from reverie.engine.bundle import load
from reverie.engine.sources import data_url
from reverie.errors import ConfigError
from reverie.train.adapting import ControlMethod, LoraMethod
from reverie.train.config import ControlRun, DataConfig, LoraRun
from reverie.train.data import PictureSet, as_images
from reverie.train.loop import Trainer
from tests import tiny
from tests.train import toy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model, trained a little."""
    root = tmp_path_factory.mktemp("model")
    toy.trained(toy.autoencoder_run(root, steps=30))
    toy.trained(toy.diffusion_run(root, root / "vae" / "export" / "vae", steps=20))
    return root / "model" / "export"


def config(root: Path, model: Path, **settings: Any) -> dict[str, Any]:
    loop = toy.loop(root / "run", **({"steps": 60, "batch": 8, "learning_rate": 5e-3} | settings))
    return {"model": model, "data": {"folder": toy.data(root / "data")}, "loop": loop}


def trained(run: LoraRun | ControlRun, until: int | None = None) -> Trainer:
    method = LoraMethod(run, toy.CPU) if isinstance(run, LoraRun) else ControlMethod(run, toy.CPU)
    trainer = Trainer(method, run.loop)
    trainer.run(toy.silent, until)
    return trainer


def runs(kind: str, root: Path, model: Path, **settings: Any) -> LoraRun | ControlRun:
    given = config(root, model, **settings)
    if kind == "lora":
        return LoraRun.model_validate(given | {"rank": 4, "layers": "linear", "text_encoder": True})
    return ControlRun.model_validate(given)


@torch.no_grad()
def error(method: LoraMethod | ControlMethod) -> float:
    """Over batches that training does not come to."""
    return sum(float(method.loss(number)[0]) for number in range(1000, 1012))


@pytest.mark.parametrize("kind", ["lora", "controlnet"])
def test_the_loss_falls_and_the_model_stays(tmp_path: Path, model: Path, kind: str) -> None:
    run = runs(kind, tmp_path, model)
    method = LoraMethod(run, toy.CPU) if isinstance(run, LoraRun) else ControlMethod(run, toy.CPU)
    start = error(method)
    trainer = Trainer(method, run.loop)
    trainer.run(toy.silent)
    assert error(method) < 0.97 * start  # the same batches and noise; measured 0.93 and 0.81
    before = load(model, device="cpu", precision="float32").parts.unet.state_dict()
    after = method.base.unet.state_dict()
    assert [name for name in before if not torch.equal(before[name].float(), after[name])] == []


@pytest.mark.parametrize("kind", ["lora", "controlnet"])
def test_stopping_and_going_on_changes_no_bit(tmp_path: Path, model: Path, kind: str) -> None:
    whole = trained(runs(kind, tmp_path / "a", model, steps=6, batch=2))
    trained(runs(kind, tmp_path / "b", model, steps=6, batch=2), until=3)
    halves = trained(runs(kind, tmp_path / "b", model, steps=6, batch=2))
    a, b = toy.state(whole), toy.state(halves)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_an_exported_lora_is_opened_and_acts(tmp_path: Path, model: Path) -> None:
    run = runs("lora", tmp_path, model, steps=10, sample_every=10)
    trained(run)
    file = run.loop.out / "export" / "lora.safetensors"
    opened = load(model, device="cpu", precision="float32")
    adapter = open_adapter(file, opened.parts)
    assert adapter.coverage.whole
    assert set(adapter.deltas) == {"unet", "text_encoder"}
    assert adapter.metadata["ss_output_name"] == "run"
    plain = opened.generate("a red square", seed=1, steps=2).pixels
    changed = opened.generate("a red square", seed=1, steps=2, loras=str(file)).pixels
    assert float((plain - changed).abs().max()) > 1e-3
    assert (run.loop.out / "samples" / "0000010.png").exists()


def test_an_exported_controlnet_is_opened_and_acts(tmp_path: Path, model: Path) -> None:
    run = runs("controlnet", tmp_path, model, steps=10, sample_every=10)
    trained(run)
    opened = load(model, device="cpu", precision="float32")
    net = open_control(run.loop.out / "export", opened.parts)
    assert net.layout == "diffusers"
    assert isinstance(run.data, DataConfig)
    picture = as_images(PictureSet(run.data).pixels([0]))[0]
    control = {"kind": "canny", "picture": data_url(picture), "net": str(run.loop.out / "export")}
    plain = opened.generate("a red square", seed=1, steps=2).pixels
    changed = opened.generate("a red square", seed=1, steps=2, controls=[control]).pixels
    assert float((plain - changed).abs().max()) > 1e-4
    assert (run.loop.out / "samples" / "0000010.png").exists()


def test_models_that_adapters_are_not_trained_for(tmp_path: Path) -> None:
    given = config(tmp_path, tiny.model(tmp_path / "inpaint", "sd1-inpaint"))
    with pytest.raises(ConfigError, match="a model of the kind inpaint"):
        LoraMethod(LoraRun.model_validate(given), toy.CPU)
