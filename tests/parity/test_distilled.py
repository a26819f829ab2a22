"""Models that draw in few steps without guidance, by their defaults, against the pipelines of diffusers.

Tolerance: 1e-3 of [0, 1] on float32 pixels, as in test_pictures.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import reverie
from tests import tiny
from tests.tiny import diffusers

PROMPT = "a red apple on a table"
EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"} | tiny.SCHEDULER | {"steps_offset": 0}
# File name -> the scheduler and the steps of its model card.
CARDS: dict[str, tuple[dict[str, Any], int]] = {
    "sd_xl_turbo_1.0": (EULER | {"_class_name": "EulerAncestralDiscreteScheduler"}, 1),
    "sdxl_lightning_4step": (EULER, 4),
    "sdxl_lightning_1step_x0": (EULER | {"prediction_type": "sample"}, 1),
    "Hyper-SDXL-2steps": (EULER | {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}, 2),
    "sdxl-lcm": ({"_class_name": "LCMScheduler", "clip_sample": False} | tiny.SCHEDULER, 4),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 0.0}], ids=["by default", "as the cards say"])
@pytest.mark.parametrize("name", list(CARDS))
def test_picture(root: Path, name: str, guidance: dict[str, Any]) -> None:
    scheduler, steps = CARDS[name]
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny.model(root, "sdxl"), add_watermarker=False)
    pipe.scheduler = tiny.scheduler_of(scheduler)
    pipe.set_progress_bar_config(disable=True)
    result = pipe(PROMPT, num_inference_steps=steps, guidance_scale=0.0, height=32, width=32,
                  generator=torch.Generator().manual_seed(3), output_type="pt")  # fmt: skip
    path = root / f"{name}.safetensors"
    if not path.exists():
        path.hardlink_to(tiny.model_file(root, "sdxl"))
    model = reverie.load(path, device="cpu", precision="float32")
    got = model.generate(PROMPT, seed=3, width=32, height=32, **guidance)
    assert got.request.guidance_scale == 1.0
    assert (got.pixels - result.images.permute(0, 2, 3, 1)).abs().max() < 1e-3
