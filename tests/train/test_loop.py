"""Whole toy runs: stopping and going on changes nothing, the loss falls, what is exported draws."""

import json
import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reverie
from reverie.checkpoint.source import open_weights
from reverie.diffusion.process import Process
from reverie.errors import ConfigError
from reverie.families.sd1 import folder
from reverie.train.config import AutoencoderRun, DataConfig, DiffusionRun, LoopConfig, read_config
from reverie.train.data import PictureSet
from reverie.train.ema import Ema
from reverie.train.loop import learning_rate
from reverie.train.methods import DiffusionMethod
from tests import tiny
from tests.train import toy


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy autoencoder, trained."""
    root = tmp_path_factory.mktemp("vae")
    toy.trained(toy.autoencoder_run(root))
    return root / "vae" / "export" / "vae"


def runs(root: Path, vae: Path, kind: str, out: str, **settings: object) -> AutoencoderRun | DiffusionRun:
    if kind == "autoencoder":
        return toy.autoencoder_run(root, out, **settings)
    return toy.diffusion_run(root, vae, out, **settings)


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2, "precision": "bfloat16"}], ids=["plain", "accumulated"])
@pytest.mark.parametrize("kind", ["autoencoder", "diffusion"])
def test_stopping_and_going_on_changes_no_bit(
    tmp_path: Path, vae: Path, kind: str, settings: dict[str, object]
) -> None:
    """4 + 4 steps against 8: weights, average, optimiser and log."""
    whole = toy.trained(runs(tmp_path, vae, kind, "whole", **settings))
    half = toy.trained(runs(tmp_path, vae, kind, "halves", **settings), until=4)
    assert half.step == 4
    halves = toy.trained(runs(tmp_path, vae, kind, "halves", **settings))
    a, b = toy.state(whole), toy.state(halves)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert toy.log(whole) == toy.log(halves)
    assert [line["step"] for line in toy.log(whole)] == list(range(1, 9))
    assert a.keys() > {f"ema.{name}" for name, _ in whole.method.network.named_parameters()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_keeps_the_step_under_way(tmp_path: Path, vae: Path, number: signal.Signals) -> None:
    """Stopped after 3 of 8 steps, between two checkpoints: what the second run has learned is the same, bit for bit."""

    def stop(step: int, _: dict[str, float]) -> None:
        if step == 3:
            os.kill(os.getpid(), number)

    whole = toy.trained(runs(tmp_path, vae, "diffusion", "whole"))
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        toy.trained(runs(tmp_path, vae, "diffusion", "stopped"), report=stop)
    assert signal.getsignal(number) is before
    assert open_weights(tmp_path / "stopped" / "checkpoint.safetensors").metadata["step"] == "3"
    rest = toy.trained(runs(tmp_path, vae, "diffusion", "stopped"))
    a, b = toy.state(whole), toy.state(rest)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert [line["step"] for line in toy.log(rest)] == list(range(1, 9))


def test_the_loss_falls(tmp_path: Path) -> None:
    trainer = toy.trained(toy.autoencoder_run(tmp_path, steps=60, batch=8))
    losses = [line["loss"] for line in toy.log(trainer)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_the_diffusion_loss_falls(tmp_path: Path, vae: Path) -> None:
    trainer = toy.trained(toy.diffusion_run(tmp_path, vae, steps=60, batch=8))
    losses = [line["loss"] for line in toy.log(trainer)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])  # noise of timesteps stays; measured 0.6


def test_exported_autoencoder_has_latents_of_variance_1(vae: Path) -> None:
    network = folder.load_part(vae, "vae").float()
    pictures = PictureSet(DataConfig(folder=vae.parents[2] / "data")).pixels(list(range(8)))
    mean, _ = network.encode(pictures)
    # float16 weights, and a scaling factor rounded to five digits
    assert float(mean.std()) * network.config.scaling_factor == pytest.approx(1, abs=0.01)


def test_exported_model_loads_and_draws(tmp_path: Path, vae: Path) -> None:
    trainer = toy.trained(toy.diffusion_run(tmp_path, vae))
    model = reverie.load(tmp_path / "model" / "export", device="cpu", precision="float32")
    result = model.generate("a red square", seed=1)
    assert result.pixels.shape == (1, toy.SIZE, toy.SIZE, 3)
    assert (result.request.steps, result.request.sampler, result.request.spacing) == (4, "dpmpp_2m", "trailing")
    assert model.parts.identity.prediction == "v_prediction"
    weights = model.parts.unet.state_dict()
    want = {k.removeprefix("unet."): v for k, v in trainer.ema.shadow.items() if k.startswith("unet.")}
    assert weights.keys() == want.keys()
    assert all(torch.equal(weights[name], want[name].half().float()) for name in want)  # exported as float16


def test_exported_noise_schedule_is_the_trained_one(tmp_path: Path, vae: Path) -> None:
    for schedule in ("linear", "scaled_linear", "cosine"):
        run = toy.diffusion_run(tmp_path, vae, schedule, steps=1)
        objective = run.objective.model_copy(update={"schedule": schedule, "zero_terminal_snr": True})
        trainer = toy.trained(run.model_copy(update={"objective": objective}))
        model = reverie.load(tmp_path / schedule / "export", device="cpu", precision="float32")
        assert isinstance(trainer.method, DiffusionMethod)
        assert isinstance(model.parts.process, Process)
        assert torch.equal(model.parts.process.betas, trainer.method.process.betas)


# diffusers wants 1 in its old samplers' configs and corrects it; trailing spacing does not use it.
@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_export_opens_in_diffusers(tmp_path: Path, vae: Path) -> None:
    toy.trained(toy.diffusion_run(tmp_path, vae))
    export = tmp_path / "model" / "export"
    pipe = tiny.diffusers.StableDiffusionPipeline.from_pretrained(export).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}  # 16x16 by the U-Net's config
    want = pipe("a red square", generator=torch.Generator().manual_seed(1), **options).images.permute(0, 2, 3, 1)
    model = reverie.load(export, device="cpu", precision="float32")
    got = model.generate("a red square", seed=1, guidance_scale=3.0).pixels
    assert (got - want).abs().max() < 1e-3  # as in tests/parity/test_pictures


def test_learning_rate_rises_then_falls_along_a_cosine(tmp_path: Path) -> None:
    config = LoopConfig(out=tmp_path, steps=100, batch=1, learning_rate=1.0, warmup=10)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:11] == pytest.approx([0.1 * (i + 1) for i in range(10)] + [1.0])
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_ema_is_the_average_it_says() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 1.0)
    ema = Ema(module, 0.9)
    want = 1.0
    for step in range(100):
        torch.nn.init.constant_(module.weight, float(step))
        ema.update(module, step)
        decay = min(0.9, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * step
    assert float(ema.shadow["weight"]) == pytest.approx(want, rel=1e-5)


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    trainer = toy.trained(toy.autoencoder_run(tmp_path), until=2)
    assert sorted(p.name for p in (tmp_path / "vae").iterdir()) == ["checkpoint.safetensors", "export", "log.jsonl"]
    saved = load_file(tmp_path / "vae" / "checkpoint.safetensors")
    state = toy.state(trainer)
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in saved)


# Bad configurations: one line each


GOOD = """
[data]
folder = "data"
[loop]
out = "out"
steps = 1
batch = 1
learning_rate = 0.001
[model]
block_out_channels = [8, 16]
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "block_out_chanels = [1]\n", "model.block_out_chanels: Extra inputs are not permitted"),
        (GOOD.replace("steps = 1\n", ""), "loop.steps: Field required"),
        (GOOD.replace("steps = 1\n", "steps = 0\n"), "loop.steps: Input should be greater than 0"),
        (GOOD.replace('folder = "data"\n', ""), "data.folder: Field required"),
        ("[data\n", "is not TOML"),
        ("", "data: Field required"),
    ],
)
def test_a_bad_configuration_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(AutoencoderRun, path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_good_configuration_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(GOOD)
    run = read_config(AutoencoderRun, tmp_path / "run.toml")
    assert run.model.block_out_channels == (8, 16)


def test_missing_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        read_config(AutoencoderRun, tmp_path / "none.toml")


def test_a_configuration_extends_another(tmp_path: Path) -> None:
    (tmp_path / "first.toml").write_text(GOOD)
    (tmp_path / "sub").mkdir()
    further = tmp_path / "sub" / "further.toml"
    further.write_text('extends = "../first.toml"\n[loop]\nsteps = 7\n')
    first, run = read_config(AutoencoderRun, tmp_path / "first.toml"), read_config(AutoencoderRun, further)
    assert first.loop.steps != 7
    assert run == first.model_copy(update={"loop": first.loop.model_copy(update={"steps": 7})})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "none.toml"', "no configuration file .*none.toml, which .*run.toml extends"),
        ('extends = "run.toml"', "run.toml extends itself"),
        ("extends = 3", "extends: found 3, expected the name of a TOML file"),
        ('extends = "first.toml"\n[model]\nblock_out_channels = 8', "run.toml: model.block_out_channels: "),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "first.toml").write_text(GOOD)
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(AutoencoderRun, tmp_path / "run.toml")


def test_missing_data(tmp_path: Path) -> None:
    run = toy.autoencoder_run(tmp_path)
    (tmp_path / "data" / "captions.jsonl").unlink()
    with pytest.raises(ConfigError, match="build the data set first"):
        toy.trained(run)


def test_changed_configuration_on_resume(tmp_path: Path) -> None:
    run = toy.autoencoder_run(tmp_path)
    toy.trained(run, until=1)
    wider = run.model_copy(update={"model": run.model.model_copy(update={"block_out_channels": (8, 32)})})
    with pytest.raises(ConfigError, match=r"the configuration has changed since; choose another loop\.out") as caught:
        toy.trained(wider)
    assert "\n" not in str(caught.value)


def test_the_log_is_one_json_object_a_step(tmp_path: Path) -> None:
    trainer = toy.trained(toy.autoencoder_run(tmp_path), until=2)
    lines = [json.loads(line) for line in (trainer.config.out / "log.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [
        {"step", "loss", "gradient_norm", "learning_rate", "psnr", "kl", "seconds"}
    ] * 2
