"""A second model that takes over, and the sizes that SDXL is told, against the pipelines of diffusers.

Tolerance: 1e-3 of [0, 1] on float32 pixels, as in test_pictures.py. Both pipelines decode with the first model's VAE:
the latents are the same, and so is one VAE less in memory.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import reverie
from tests import tiny
from tests.tiny import diffusers

PROMPT, NEGATIVE = "a red apple on a table", "blurry"
SCHEDULERS: dict[str, dict[str, Any]] = {
    "euler": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    "euler_a": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "ddim": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    "dpmpp_2m": {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
    "dpmpp_3m": {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
    "unipc": {"_class_name": "UniPCMultistepScheduler"},
    "pndm": {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def pipes(root: Path) -> tuple[Any, Any]:
    """The pipelines of base and refiner, which share the base's VAE."""
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny.model(root, "sdxl"), add_watermarker=False)
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(
        tiny.model(root, "refiner"), vae=base.vae, add_watermarker=False
    )
    for pipe in (base, refiner):
        pipe.set_progress_bar_config(disable=True)
    return base, refiner


@cache
def folder(root: Path, kind: str, scheduler: str) -> Path:
    """The folder of a model with another scheduler; the weights are links."""
    path = root / f"{kind}-{scheduler}"
    tiny.linked(tiny.model(root, kind), path)
    config = path / "scheduler" / "scheduler_config.json"
    config.unlink()
    config.write_text(json.dumps(tiny.SCHEDULER | SCHEDULERS[scheduler]), encoding="utf-8")
    return path


@cache
def model(root: Path, scheduler: str) -> reverie.Model:
    return reverie.load(folder(root, "sdxl", scheduler), device="cpu", precision="float32")


def scheduled(root: Path, name: str) -> tuple[Any, Any]:
    base, refiner = pipes(root)
    for pipe in (base, refiner):
        pipe.scheduler = tiny.scheduler_of(tiny.SCHEDULER | SCHEDULERS[name])
    return base, refiner


def pixels(result: Any) -> Tensor:
    found: Tensor = result.images.permute(0, 2, 3, 1).float()
    return found


COMMON: dict[str, Any] = {"negative_prompt": NEGATIVE, "guidance_scale": 4.0}


# Not LMS: in the middle of its steps diffusers weighs the one answer it has as the newest of four.
@pytest.mark.parametrize(
    ("name", "steps", "at"), [*((name, 8, 0.8) for name in SCHEDULERS), ("dpmpp_3m", 20, 0.45), ("pndm", 20, 0.45)]
)
def test_handed_over(root: Path, name: str, steps: int, at: float) -> None:
    """`denoising_end` and `denoising_start`: the refiner goes on with the sample, noise and all."""
    base, refiner = scheduled(root, name)
    generator = torch.Generator().manual_seed(3)
    given: dict[str, Any] = {"num_inference_steps": steps, "generator": generator, **COMMON}
    half = base(PROMPT, denoising_end=at, output_type="latent", height=32, width=48, **given).images
    want = pixels(refiner(PROMPT, image=half, denoising_start=at, output_type="pt", **given))
    got = model(root, name).generate(
        PROMPT, steps=steps, width=48, height=32, seed=3, **COMMON,
        refine={"model": str(folder(root, "refiner", name)), "at": at},
    )  # fmt: skip
    assert (got.pixels - want).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp_2m"])
def test_drawn_over(root: Path, name: str) -> None:
    """Image to image with the latents as they are: they are not decoded in between."""
    base, refiner = scheduled(root, name)
    given: dict[str, Any] = {"generator": torch.Generator().manual_seed(3), **COMMON}
    first = base(PROMPT, num_inference_steps=4, output_type="latent", height=32, width=32, **given).images
    want = pixels(refiner(PROMPT, image=first, num_inference_steps=6, strength=0.5, output_type="pt", **given))
    got = model(root, name).generate(
        PROMPT, steps=4, width=32, height=32, seed=3, **COMMON,
        refine={"model": str(folder(root, "refiner", name)), "strength": 0.5, "steps": 6},
    )  # fmt: skip
    assert (got.pixels - want).abs().max() < 1e-3


SIZES: dict[str, Any] = {"original_size": (100, 90), "crop": (3, 5), "target_size": (80, 72)}
NEGATIVE_SIZES: dict[str, Any] = {
    "negative_original_size": (30, 20), "negative_crop": (7, 1), "negative_target_size": (50, 40),
}  # fmt: skip
THEIRS = {"crop": "crops_coords_top_left", "negative_crop": "negative_crops_coords_top_left"}


def theirs(sizes: dict[str, Any]) -> dict[str, Any]:
    """As diffusers names them, rows before columns."""
    return {THEIRS.get(name, name): v[::-1] if isinstance(v, tuple) else v for name, v in sizes.items()}


@pytest.mark.parametrize("sizes", [SIZES, SIZES | NEGATIVE_SIZES, {"crop": (40, 8)}], ids=["some", "all", "crop"])
def test_sizes(root: Path, sizes: dict[str, Any]) -> None:
    base, _ = scheduled(root, "euler")
    given: dict[str, Any] = {"generator": torch.Generator().manual_seed(3), "height": 32, "width": 48, **COMMON}
    want = pixels(base(PROMPT, num_inference_steps=3, output_type="pt", **given, **theirs(sizes)))
    drawn = model(root, "euler").generate(PROMPT, steps=3, width=48, height=32, seed=3, **COMMON, sizes=sizes)
    plain = model(root, "euler").generate(PROMPT, steps=3, width=48, height=32, seed=3, **COMMON)
    assert (drawn.pixels - want).abs().max() < 1e-3
    assert (plain.pixels - want).abs().max() > 2e-3


def test_sizes_of_the_refiner(root: Path) -> None:
    """Aesthetic scores instead of target sizes."""
    _, refiner = scheduled(root, "euler")
    scores = {"aesthetic_score": 8.5, "negative_aesthetic_score": 1.0}
    sizes = {"original_size": (100, 90), "crop": (3, 5), "negative_original_size": (30, 20)} | scores
    image = Image.effect_noise((32, 32), 90).convert("RGB")
    given: dict[str, Any] = {"generator": torch.Generator().manual_seed(3), **COMMON}
    want = pixels(refiner(PROMPT, image=image, num_inference_steps=6, strength=0.5, output_type="pt", **given,
                          **theirs(sizes), negative_crops_coords_top_left=(5, 3)))  # fmt: skip
    alone = reverie.load(
        folder(root, "refiner", "euler"), device="cpu", precision="float32", vae=folder(root, "sdxl", "euler") / "vae"
    )
    got = alone.generate(PROMPT, image=image, steps=6, strength=0.5, seed=3, **COMMON, sizes=sizes)
    assert (got.pixels - want).abs().max() < 1e-3
