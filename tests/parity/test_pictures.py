"""Whole pictures against diffusers: same weights, same seeds, every sampler both have.

Tolerance: 1e-3 of [0, 1] on float32 pixels. The two sum in different orders (diffusers keeps x in DDPM units, Reverie
in units of sigma), which grows over the steps; typical differences are near 1e-5.
"""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import reverie
from tests import tiny

CLASSES = {
    "pndm": diffusers.PNDMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}
EXTRA: dict[str, dict[str, Any]] = {
    "pndm": {"skip_prk_steps": True},
    "ddim": {"clip_sample": False, "set_alpha_to_one": False},
    "ddpm": {"clip_sample": False},
}
KARRAS = ("euler", "heun", "lms", "dpmpp_2m")


def scheduler(name: str, spacing: str, prediction: str) -> Any:
    settings = tiny.SCHEDULER | EXTRA.get(name, {}) | {"prediction_type": prediction}
    if spacing in {"karras", "exponential"}:
        settings |= {"timestep_spacing": "linspace", f"use_{spacing}_sigmas": True}
    else:
        settings |= {"timestep_spacing": spacing}
    return CLASSES[name](**settings)


def reference(pipe: Any, steps: int, **options: Any) -> torch.Tensor:
    result = pipe(
        "a red apple on a table",
        negative_prompt="blurry",
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(11),
        output_type="pt",
        **options,
    )
    return result.images.permute(0, 2, 3, 1).float()


@pytest.fixture(scope="module")
def pipe_and_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    root = tmp_path_factory.mktemp("tiny")
    pipe = tiny.pipeline(root, scheduler("ddim", "leading", "epsilon"))
    pipe.save_pretrained(root / "model")
    return pipe, root / "model"


def cases() -> list[tuple[str, str, str, int]]:
    found = []
    for name in CLASSES:
        spacings = ["leading", "trailing", "linspace"]
        if name in KARRAS:
            spacings += ["karras", "exponential"]
        for spacing in spacings:
            for prediction in ("epsilon", "v_prediction"):
                found.append((name, spacing, prediction, 7))
    return found


@pytest.mark.parametrize(("name", "spacing", "prediction", "steps"), cases())
def test_picture_equals_diffusers(
    pipe_and_folder: tuple[Any, Path], name: str, spacing: str, prediction: str, steps: int
) -> None:
    pipe, folder = pipe_and_folder
    pipe.scheduler = scheduler(name, spacing, prediction)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    want = reference(pipe, steps)
    got = reverie.load(folder, device="cpu", precision="float32").generate(
        "a red apple on a table", negative_prompt="blurry", steps=steps, guidance_scale=4.0, seed=11
    )
    assert got.request.sampler == name
    assert got.request.spacing == spacing
    assert (got.pixels - want).abs().max() < 1e-3
    print(name, spacing, prediction, (got.pixels - want).abs().max())
