"""`Model.generate` with a tiny model: batches, seeds, refusals, defaults."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL.Image import Image
from safetensors.torch import load_file, save_file

import reverie
from reverie.diffusion.process import Process
from reverie.diffusion.spacing import SpacingRules
from reverie.engine.bundle import Model
from reverie.errors import CheckpointError, RequestError
from reverie.sampling.registry import load_all
from tests import tiny

SCHEDULER: dict[str, Any] = tiny.SCHEDULER | {"_class_name": "DDIMScheduler", "clip_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    tiny.pipeline(root, tiny.scheduler_of(SCHEDULER)).save_pretrained(root / "model")
    return root / "model"


def opened(path: Path, **options: Any) -> Model:
    return reverie.load(path, device="cpu", precision="float32", **options)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return opened(folder)


def draw(model: Model, **fields: Any) -> "reverie.Result":
    return model.generate("a red apple", **{"steps": 3, "seed": 7, "guidance_scale": 4.0} | fields)


NOISY = [{"sampler": "euler_a"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "dpmpp_2m", "spacing": "karras"}]


@pytest.mark.parametrize("fields", NOISY)
def test_a_count_is_so_many_single_pictures(model: Model, fields: dict[str, Any]) -> None:
    """Picture i of a count is the picture of seed + i, in the same bits."""
    together = draw(model, count=4, batch_size=1, **fields)
    for i in range(4):
        alone = draw(model, seed=7 + i, **fields)
        assert torch.equal(together.pixels[i], alone.pixels[0])
        assert torch.equal(together.latents[i], alone.latents[0])


@pytest.mark.parametrize("batch_size", [3, 4])
@pytest.mark.parametrize("fields", NOISY)
def test_batch_size_changes_rounding_alone(model: Model, fields: dict[str, Any], batch_size: int) -> None:
    """Other shapes take other sums: 1e-6 a step, far below 1e-4; one pixel step is 4e-3."""
    one, many = draw(model, count=4, **fields), draw(model, count=4, batch_size=batch_size, **fields)
    assert (one.pixels - many.pixels).abs().max() < 1e-4


def test_pictures_of_a_count_differ(model: Model) -> None:
    pixels = draw(model, count=2).pixels
    assert (pixels[0] - pixels[1]).abs().max() > 0.01


@pytest.mark.parametrize("sampler", list(load_all()))
def test_the_same_request_draws_the_same_bits(model: Model, sampler: str) -> None:
    a, b = draw(model, sampler=sampler), draw(model, sampler=sampler)
    assert torch.equal(a.pixels, b.pixels)
    assert torch.equal(a.latents, b.latents)


def test_a_result_request_draws_its_picture_again(model: Model) -> None:
    """Without a seed one is drawn and told, and the explicit request needs nothing from the defaults."""
    first = model.generate("a pear", steps=2)
    assert first.request.seed is not None
    assert None not in (first.request.sampler, first.request.spacing, first.request.width, first.request.steps)
    assert torch.equal(model.draw(first.request).pixels, first.pixels)


def test_result_fields(model: Model) -> None:
    result = draw(model, count=2, width=40, height=24)
    assert result.pixels.shape == (2, 24, 40, 3)
    assert result.latents.shape == (2, 4, 6, 10)
    assert (result.pixels.dtype, result.latents.dtype) == (torch.float32, torch.float32)
    assert (float(result.pixels.min()) >= 0, float(result.pixels.max()) <= 1) == (True, True)
    assert [type(image).__mro__[-2] for image in result.images] == [Image, Image]
    assert result.images[0].size == (40, 24)
    assert result.request.prompt == "a red apple"


def test_images_are_the_rounded_pixels(model: Model) -> None:
    result = draw(model)
    want = (result.pixels[0] * 255).round().byte().flatten().tolist()
    assert list(result.images[0].tobytes()) == want


def test_guidance_1_leaves_out_the_negative_prompt(model: Model) -> None:
    one = draw(model, guidance_scale=1, negative_prompt="blurry")
    other = draw(model, guidance_scale=1, negative_prompt="a very different thing")
    assert torch.equal(one.pixels, other.pixels)
    assert not torch.equal(draw(model, negative_prompt="blurry").pixels, draw(model).pixels)


def test_guidance_0_leaves_out_the_prompt(model: Model) -> None:
    a = draw(model, guidance_scale=0)
    b = model.generate("something else", steps=3, seed=7, guidance_scale=0)
    assert torch.equal(a.pixels, b.pixels)


def test_the_prompt_matters(model: Model) -> None:
    other = model.generate("a blue chair", steps=3, seed=7, guidance_scale=4.0)
    assert not torch.equal(draw(model).pixels, other.pixels)


def test_clip_skip_matters_up_to_the_number_of_layers(model: Model) -> None:
    pictures = [draw(model, clip_skip=skip).pixels for skip in (1, 2, 3)]
    assert not torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[1], pictures[2])


def test_progress_counts_every_evaluation(model: Model) -> None:
    told: list[tuple[int, int]] = []
    model.generate("x", steps=3, sampler="heun", count=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(i, 10) for i in range(1, 11)]  # (2 * 3 - 1) evaluations a picture


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 101}, "width is 101; it must be a multiple of 4, the nearest is 100"),
        ({"height": 31}, "height is 31; it must be a multiple of 4, the nearest is 32"),
        ({"sampler": "dpmp_2m"}, "unknown sampler 'dpmp_2m'; did you mean 'dpmpp_2m'"),
        ({"spacing": "caras"}, "unknown spacing 'caras'; did you mean 'karras'"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "steps is 1001"),
        ({"clip_skip": 4}, "clip_skip is 4; the text encoder has 3 layers"),
        ({"clip_skip": 0}, "clip_skip is 0"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"count": 0}, "count is 0"),
        ({"step": 5}, "unknown field 'step'; did you mean steps"),
    ],
)
def test_refusals_are_one_line(model: Model, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        draw(model, **fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sampler", [name for name in load_all() if "eta" not in load_all()[name].options])
def test_eta_only_for_samplers_that_have_it(model: Model, sampler: str) -> None:
    with pytest.raises(RequestError, match=f"sampler {sampler} has no option 'eta'"):
        draw(model, sampler=sampler, eta=0.5)


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_eta_matters(model: Model, sampler: str) -> None:
    assert not torch.equal(draw(model, sampler=sampler, eta=0).pixels, draw(model, sampler=sampler, eta=1).pixels)


def test_eta_0_of_euler_a_is_euler(model: Model) -> None:
    a = draw(model, sampler="euler_a", eta=0, spacing="karras")
    b = draw(model, sampler="euler", spacing="karras")
    assert (a.pixels - b.pixels).abs().max() < 1e-5


def test_a_long_prompt_is_read_to_its_end(model: Model) -> None:
    long = " ".join(["apple"] * 75)
    cut, whole, other = (
        model.generate(text, steps=1, seed=1).pixels for text in (long, f"{long} purple zebra", f"{long} green zebra")
    )
    assert not torch.equal(whole, cut)
    assert not torch.equal(whole, other)


def test_a_prompt_that_just_fits_does_not_warn(model: Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(" ".join(["apple"] * 75), steps=1, seed=1)


# The model's own scheduler config decides what a request leaves open.


@pytest.fixture
def rescheduled(folder: Path, tmp_path: Path) -> Callable[..., Model]:
    def make(**config: Any) -> Model:
        shutil.copytree(folder, tmp_path / "model", dirs_exist_ok=True)
        path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(tiny.SCHEDULER | config))
        return opened(tmp_path / "model")

    return make


def test_sampler_and_spacing_come_from_the_scheduler_config(rescheduled: Callable[..., Model]) -> None:
    request = draw(rescheduled(_class_name="EulerDiscreteScheduler", timestep_spacing="trailing")).request
    assert (request.sampler, request.spacing) == ("euler", "trailing")


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_spacing_flags_of_the_scheduler_config(rescheduled: Callable[..., Model], spacing: str) -> None:
    flag = {f"use_{spacing}_sigmas": True}
    request = draw(rescheduled(_class_name="DPMSolverMultistepScheduler", **flag)).request
    assert (request.sampler, request.spacing) == ("dpmpp_2m", spacing)


@pytest.mark.parametrize(("to_one", "zero"), [(True, True), (False, False)])
def test_final_sigma_of_the_scheduler_config(rescheduled: Callable[..., Model], to_one: bool, zero: bool) -> None:
    parts = rescheduled(_class_name="DDIMScheduler", clip_sample=False, set_alpha_to_one=to_one).parts
    assert parts.defaults.rules.final_sigma == (0.0 if zero else parts.process.sigma_min)
    parts = rescheduled(_class_name="EulerDiscreteScheduler", final_sigmas_type="zero" if zero else "sigma_min").parts
    assert parts.defaults.rules.final_sigma == (0.0 if zero else parts.process.sigma_min)


def test_steps_offset_of_the_scheduler_config(rescheduled: Callable[..., Model]) -> None:
    parts = rescheduled(_class_name="DDIMScheduler", clip_sample=False, steps_offset=1, set_alpha_to_one=True).parts
    assert parts.defaults.rules == SpacingRules(steps_offset=1, base="leading")


def test_noise_schedule_of_the_scheduler_config(rescheduled: Callable[..., Model]) -> None:
    config = {"_class_name": "DDPMScheduler", "clip_sample": False, "beta_schedule": "squaredcos_cap_v2"}
    scheduler = tiny.scheduler_of(tiny.SCHEDULER | config)
    process = rescheduled(**config).parts.process
    assert isinstance(process, Process)
    got = process.betas
    torch.testing.assert_close(got, scheduler.betas.double(), rtol=1e-6, atol=1e-6)  # diffusers': float32


def test_prediction_of_the_scheduler_config_and_its_override(rescheduled: Callable[..., Model], folder: Path) -> None:
    v = rescheduled(_class_name="DDIMScheduler", clip_sample=False, prediction_type="v_prediction")
    assert v.parts.identity.prediction == "v_prediction"
    overridden = opened(folder, prediction="v")
    assert overridden.parts.identity.prediction == "v_prediction"
    assert overridden.parts.identity.evidence[-1] == ("prediction v_prediction", "asked for")
    assert torch.equal(draw(v, sampler="euler").pixels, draw(overridden, sampler="euler").pixels)
    assert not torch.equal(draw(v, sampler="euler").pixels, draw(opened(folder), sampler="euler").pixels)
    with pytest.raises(RequestError, match="unknown prediction type 'w'"):
        opened(folder, prediction="w")


# Damaged weights


@pytest.mark.parametrize(
    ("part", "file", "tensor"),
    [
        ("text_encoder", "model", "encoder.layers.1.mlp.fc1.bias"),
        ("unet", "diffusion_pytorch_model", "mid_block.resnets.0.conv1.weight"),
        ("vae", "diffusion_pytorch_model", "decoder.conv_out.bias"),
    ],
)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_damaged_weights_are_named(
    folder: Path, tmp_path: Path, part: str, file: str, tensor: str, poison: float
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / part / f"{file}.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    name = next(name for name in tensors if name.endswith(tensor))
    tensors[name].view(-1)[0] = poison
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"tensor \S*{tensor} of {part} has NaN or infinite"):
        draw(opened(tmp_path / "model"))
