"""Image to image, inpainting of both kinds, instruct-pix2pix: whole pictures against the pipelines of diffusers.

Tolerance: 1e-3 of [0, 1] on float32 pixels, as in test_pictures.py. Masks are whole latents here but in one test: where
they are not, diffusers looks at one pixel of each latent, and so does our preset of that name.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import reverie
from tests import tiny
from tests.tiny import diffusers

SIZE = 32  # pixels; four pixels a latent
PROMPT, NEGATIVE = "a red apple on a table", "blurry"


def image(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8))


def mask(box: tuple[int, int, int, int] = (8, 12, 28, 24)) -> Image.Image:
    found = Image.new("L", (SIZE, SIZE), 0)
    found.paste(255, box)
    return found


SCHEDULERS: dict[str, dict[str, Any]] = {
    "ddim": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    "pndm": {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    "euler": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"},
    "euler_a": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "dpmpp_2m": {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
    "unipc": {"_class_name": "UniPCMultistepScheduler"},
    "heun": {"_class_name": "HeunDiscreteScheduler"},
}


def folder_of(pipe: Any, root: Path, name: str) -> Path:
    """The pipeline as a folder with a scheduler of that name."""
    pipe.scheduler = tiny.scheduler_of(tiny.SCHEDULER | SCHEDULERS[name])
    pipe.save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("plain")
    return tiny.pipeline(root, tiny.scheduler_of(tiny.SCHEDULER | SCHEDULERS["ddim"]), merges_kept=500)


def drawn(folder: Path, **fields: Any) -> Tensor:
    model = reverie.load(folder, device="cpu", precision="float32")
    return model.generate(PROMPT, negative_prompt=NEGATIVE, seed=5, guidance_scale=4.0, **fields).pixels


def reference(pipe: Any, **options: Any) -> Tensor:
    result = pipe(PROMPT, negative_prompt=NEGATIVE, guidance_scale=4.0, generator=torch.Generator().manual_seed(5),
                  output_type="pt", **options)  # fmt: skip
    found: Tensor = result.images.permute(0, 2, 3, 1).float()
    return found


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "euler_a", "dpmpp_2m", "unipc"])
def test_image_to_image(plain: Any, tmp_path: Path, name: str, strength: float) -> None:
    folder = folder_of(plain, tmp_path, name)
    pipe = quiet(diffusers.StableDiffusionImg2ImgPipeline(**plain.components, requires_safety_checker=False))
    want = reference(pipe, image=image(), strength=strength, num_inference_steps=8)
    got = drawn(folder, image=image(), strength=strength, steps=8)
    assert (got - want).abs().max() < 1e-3


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "euler_a", "dpmpp_2m", "heun"])
def test_inpainting_with_an_ordinary_model(plain: Any, tmp_path: Path, name: str, strength: float) -> None:
    folder = folder_of(plain, tmp_path, name)
    pipe = quiet(diffusers.StableDiffusionInpaintPipeline(**plain.components, requires_safety_checker=False))
    want = reference(pipe, image=image(), mask_image=mask(), strength=strength, num_inference_steps=6,
                     height=SIZE, width=SIZE)  # fmt: skip
    got = drawn(folder, image=image(), mask=mask(), strength=strength, steps=6, keep_unmasked=False)
    assert (got - want).abs().max() < 1e-3


def test_masks_that_cut_latents_are_read_as_diffusers_does_with_its_preset(plain: Any, tmp_path: Path) -> None:
    folder = folder_of(plain, tmp_path, "ddim")
    pipe = quiet(diffusers.StableDiffusionInpaintPipeline(**plain.components, requires_safety_checker=False))
    odd = mask((7, 9, 27, 23))
    want = reference(pipe, image=image(), mask_image=odd, strength=1.0, num_inference_steps=5, height=SIZE, width=SIZE)
    got = drawn(folder, image=image(), mask=odd, steps=5, keep_unmasked=False, preset="diffusers", spacing="leading")
    assert (got - want).abs().max() < 1e-3


def test_unmasked_pixels_are_the_pictures(plain: Any, tmp_path: Path) -> None:
    got = drawn(folder_of(plain, tmp_path, "euler"), image=image(), mask=mask(), steps=3)
    kept = np.asarray(mask()) == 0
    assert np.array_equal((got[0] * 255).round().byte().numpy()[kept], np.asarray(image())[kept])


@pytest.fixture(scope="module")
def with_more_channels(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    found = {}
    for channels in (8, 9):
        torch.manual_seed(channels)
        networks = (tiny.text_encoder(), tiny.unet(in_channels=channels), tiny.vae())
        root = tmp_path_factory.mktemp(f"channels{channels}")
        scheduler = tiny.scheduler_of(tiny.SCHEDULER | SCHEDULERS["ddim"])
        found[channels] = tiny.assembled(root, scheduler, networks, 500)
    return found


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", ["ddim", "euler", "euler_a"])
def test_inpainting_with_nine_channels(
    with_more_channels: dict[int, Any], tmp_path: Path, name: str, strength: float
) -> None:
    plain = with_more_channels[9]
    folder_of(plain, tmp_path, name)
    pipe = quiet(diffusers.StableDiffusionInpaintPipeline(**plain.components, requires_safety_checker=False))
    pipe.save_pretrained(tmp_path / "inpaint")
    want = reference(pipe, image=image(), mask_image=mask(), strength=strength, num_inference_steps=6,
                     height=SIZE, width=SIZE)  # fmt: skip
    got = drawn(tmp_path / "inpaint", image=image(), mask=mask(), strength=strength, steps=6, keep_unmasked=False)
    assert (got - want).abs().max() < 1e-3


@pytest.mark.parametrize("image_scale", [1.0, 1.5])
@pytest.mark.parametrize("name", ["ddim", "euler_a"])
def test_instruct_pix2pix(with_more_channels: dict[int, Any], tmp_path: Path, name: str, image_scale: float) -> None:
    plain = with_more_channels[8]
    folder_of(plain, tmp_path, name)
    pipe = quiet(diffusers.StableDiffusionInstructPix2PixPipeline(**plain.components, requires_safety_checker=False))
    pipe.save_pretrained(tmp_path / "pix2pix")
    want = reference(pipe, image=image(), image_guidance_scale=image_scale, num_inference_steps=6)
    got = drawn(tmp_path / "pix2pix", image=image(), image_guidance_scale=image_scale, steps=6)
    assert (got - want).abs().max() < 1e-3


def test_a_batch_is_its_pictures(plain: Any, tmp_path: Path) -> None:
    folder = folder_of(plain, tmp_path, "euler_a")
    fields: dict[str, Any] = {"image": image(), "mask": mask(), "strength": 0.7, "steps": 4}
    together = drawn(folder, count=3, batch_size=3, **fields)
    model = reverie.load(folder, device="cpu", precision="float32")
    for i in range(3):
        alone = model.generate(PROMPT, negative_prompt=NEGATIVE, guidance_scale=4.0, seed=5 + i, **fields).pixels
        assert (together[i] - alone[0]).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("channels", [4, 8, 9], ids=["image and inpaint", "pix2pix", "nine channels"])
def test_true_size(tmp_path: Path, channels: int) -> None:
    """Stable Diffusion 1.5 with random weights, float32, pictures of 64x64 in 2 steps. Peak memory about 9 GB."""
    torch.manual_seed(0)
    text = tiny.text_encoder(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64, in_channels=channels).eval()
    vae = tiny.vae(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    scheduler = tiny.scheduler_of(tiny.SCHEDULER | SCHEDULERS["ddim"])
    plain = tiny.assembled(tmp_path, scheduler, (text, unet, vae), 500)
    picture, hole = image().resize((64, 64)), mask().resize((64, 64), Image.Resampling.NEAREST)
    kinds = {4: ("Img2Img", "Inpaint"), 8: ("InstructPix2Pix",), 9: ("Inpaint",)}[channels]
    wanted = []
    for kind in kinds:
        pipe = quiet(getattr(diffusers, f"StableDiffusion{kind}Pipeline")(**plain.components,
                                                                          requires_safety_checker=False))  # fmt: skip
        options: dict[str, Any] = {"image": picture, "num_inference_steps": 4}
        fields: dict[str, Any] = {"image": picture, "steps": 4}
        if kind == "InstructPix2Pix":
            options["num_inference_steps"] = fields["steps"] = 2
        else:
            options["strength"] = fields["strength"] = 0.5
        if kind == "Inpaint":
            options |= {"mask_image": hole, "height": 64, "width": 64}
            fields |= {"mask": hole, "keep_unmasked": False}
        wanted.append((fields, reference(pipe, **options)))
    pipe.save_pretrained(tmp_path / "model")
    del pipe, plain, text, unet, vae
    for fields, want in wanted:
        assert (drawn(tmp_path / "model", **fields) - want).abs().max() < 1e-3


def test_models_that_see_a_picture_ask_for_one(with_more_channels: dict[int, Any], tmp_path: Path) -> None:
    for channels, said in ((8, "pix2pix, which starts from a picture"), (9, "inpaint, which starts from a picture")):
        folder = folder_of(with_more_channels[channels], tmp_path / str(channels), "ddim")
        with pytest.raises(reverie.ReverieError, match=said):
            drawn(folder, steps=1)
    with pytest.raises(reverie.ReverieError, match="this model fills masks"):
        drawn(tmp_path / "9" / "model", image=image(), steps=1)


def test_hires_after_image_to_image_is_larger(plain: Any, tmp_path: Path) -> None:
    got = drawn(folder_of(plain, tmp_path, "ddim"), image=image(), steps=2, hires={"scale": 2.0})
    assert got.shape == (1, 2 * SIZE, 2 * SIZE, 3)
