"""A picture of every family, from the folder and from the single file, against the pipeline of diffusers.

Tolerance: 1e-3 of [0, 1] on float32 pixels, as in test_pictures.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reverie
from tests import tiny
from tests.tiny import diffusers

PROMPT, NEGATIVE = "a red apple on a table", "blurry"
KINDS = ("sd1", "bk-sdm-small", "tiny-sd", "sd2", "sd2-v", "sdxl", "ssd-1b", "koala", "playground")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def reference(folder: Path, negative: str | None, **options: Any) -> Tensor:
    absent = {} if (folder / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
    absent = absent if folder.name.startswith("sd3") else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **absent)
    pipe.set_progress_bar_config(disable=True)
    result = pipe(
        PROMPT, negative_prompt=negative, num_inference_steps=4, guidance_scale=4.0, output_type="pt",
        generator=torch.Generator().manual_seed(5), **options,
    )  # fmt: skip
    found: Tensor = result.images.permute(0, 2, 3, 1).float()
    return found


def drawn(path: Path, negative: str, *, prediction: str | None = None, **fields: Any) -> Tensor:
    model = reverie.load(path, device="cpu", precision="float32", prediction=prediction)
    fields = {"steps": 4, "guidance_scale": 4.0, "seed": 5} | fields
    return model.generate(PROMPT, negative_prompt=negative, **fields).pixels


@pytest.mark.parametrize("negative", [NEGATIVE, ""])
@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_draws_what_diffusers_draws(root: Path, kind: str, negative: str) -> None:
    folder = tiny.model(root, kind)
    want = reference(folder, negative or None, height=32, width=32)
    assert (drawn(folder, negative, height=32, width=32) - want).abs().max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_single_file_draws_what_its_folder_draws(root: Path, kind: str) -> None:
    """Random weights do not show that they predict v: there it is said, as `--prediction v` does."""
    folder, file = (
        drawn(path, NEGATIVE, height=32, width=32, sampler="euler", spacing="karras",
              prediction="v" if kind == "sd2-v" else None)
        for path in (tiny.model(root, kind), tiny.model_file(root, kind))
    )  # fmt: skip
    assert (file - folder).abs().max() < 1e-5


@pytest.mark.parametrize("kind", sorted(tiny.SD3_KINDS))
def test_stable_diffusion_3(root: Path, kind: str) -> None:
    folder = tiny.sd3_model(root, kind)
    want = reference(folder, NEGATIVE, height=32, width=32)
    assert (drawn(folder, NEGATIVE, height=32, width=32) - want).abs().max() < 1e-3


def test_parts_from_elsewhere(root: Path) -> None:
    """A U-Net of one file with the VAE and text encoder of another is what diffusers draws with them."""
    one, other = tiny.model(root, "sd1"), tiny.model(root, "bk-sdm-small")
    model = reverie.load(one, device="cpu", precision="float32", unet=other / "unet")
    got = model.generate(PROMPT, negative_prompt=NEGATIVE, steps=4, guidance_scale=4.0, seed=5, height=32, width=32)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        one, unet=diffusers.UNet2DConditionModel.from_pretrained(other / "unet"), local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    want = pipe(PROMPT, negative_prompt=NEGATIVE, num_inference_steps=4, guidance_scale=4.0, output_type="pt",
                height=32, width=32, generator=torch.Generator().manual_seed(5)).images  # fmt: skip
    assert (got.pixels - want.permute(0, 2, 3, 1).float()).abs().max() < 1e-3
