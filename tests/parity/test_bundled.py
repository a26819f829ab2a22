"""The bundled model's folder opens in diffusers and draws the same picture there."""

import torch

import reverie
from reverie.engine.bundle import bundled_path
from tests.tiny import diffusers


def test_diffusers_draws_the_same_picture() -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(bundled_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    options = {"num_inference_steps": 20, "guidance_scale": 4.0, "height": 64, "width": 64, "output_type": "pt"}
    want = pipe("a red apple", generator=generator, **options).images.permute(0, 2, 3, 1)
    got = reverie.load(device="cpu").generate("a red apple", seed=7, upscaler="none")
    assert got.pixels.shape == want.shape
    # float32 in another order of operations; measured 2.8e-6
    assert (got.pixels - want).abs().max() < 1e-4
