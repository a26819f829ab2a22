"""CLIP scores against transformers' CLIPModel, from each kind of file."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from reverie.errors import CheckpointError
from reverie.evaluate.clip_score import Clip, clip_scores, open_clip
from reverie.families.vision import VISION, config_of_shapes, tidied
from reverie.nets.clip_vision import clip_pixels
from tests import tiny
from tests.adapters.pictured import picture

CPU = torch.device("cpu")
PROMPTS = ["a red fox", "two owls on a house, flat style", "a rocket"]
# Heads are 64 wide in every published CLIP's text encoder; the image encoder of a file has 16 heads.
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1,
        "hidden_act": "quick_gelu", "eos_token_id": 49407, "bos_token_id": 49406}  # fmt: skip
VISION_SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 16,
                "image_size": 28, "patch_size": 14, "hidden_act": "quick_gelu"}  # fmt: skip


def whole_clip() -> Any:
    """Of transformers, with random weights."""
    torch.manual_seed(0)
    config = tiny.transformers.CLIPConfig(text_config=TEXT, vision_config=VISION_SHAPE, projection_dim=48)
    found = tiny.transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    return whole_clip()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    model.save_pretrained(path)
    return path


def wanted(model: Any, clip: Clip, pictures: list[Image.Image]) -> torch.Tensor:
    """As the paper defines it, from transformers' own embeddings."""
    ids = torch.tensor([clip.tokenizer(prompt).ids for prompt in PROMPTS])
    pixels = torch.cat([clip_pixels(one, 28) for one in pictures])
    with torch.no_grad():
        answer = model(input_ids=ids, pixel_values=pixels)
    cosines: torch.Tensor = (answer.image_embeds * answer.text_embeds).sum(1)
    return 100 * cosines.clamp(min=0)


def test_folder(model: Any, folder: Path) -> None:
    clip, pictures, calls = open_clip(folder, CPU), [picture(n) for n in range(3)], []
    found = clip_scores(clip, [partial(picture, n) for n in range(3)], PROMPTS, lambda *done: calls.append(done))
    torch.testing.assert_close(found, wanted(model, clip, pictures), rtol=1e-4, atol=1e-4)
    assert calls == [(3, 3)]
    assert len({round(float(score), 3) for score in found}) > 1


def test_opposite_is_zero(folder: Path) -> None:
    """Of a picture whose embedding points away from the prompt's."""
    clip = open_clip(folder, CPU)
    clip.vision.visual_projection.weight.mul_(-1)  # type: ignore[union-attr]
    one, other = (clip_scores(c, [picture], PROMPTS[:1]) for c in (clip, open_clip(folder, CPU)))
    assert sorted([float(one) > 0, float(other) > 0]) == [False, True]


def test_single_file(model: Any, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "clip.safetensors"
    save_file(load_file(folder / "model.safetensors"), path)
    clip = open_clip(path, CPU)
    found = clip_scores(clip, [partial(picture, n) for n in range(3)], PROMPTS)
    torch.testing.assert_close(found, wanted(model, clip, [picture(n) for n in range(3)]), rtol=1e-4, atol=1e-4)


def test_single_file_of_open_clip(model: Any, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    text = {n: t for n, t in tensors.items() if n.startswith("text_")}
    path = tmp_path / "open_clip.safetensors"
    theirs = tiny.open_clip_tensors(text) | tiny.open_clip_vision(tidied(tensors))
    save_file({n: t.contiguous().clone() for n, t in theirs.items()} | {"logit_scale": torch.ones(1)}, path)
    opened = open_clip(path, CPU)
    found = clip_scores(opened, [partial(picture, n) for n in range(3)], PROMPTS)
    torch.testing.assert_close(found, wanted(model, opened, [picture(n) for n in range(3)]), rtol=1e-4, atol=1e-4)


def test_half_a_clip(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    seeing = {n: t for n, t in tensors.items() if n.startswith("vision_model.") or n == "visual_projection.weight"}
    save_file(seeing, tmp_path / "vision.safetensors")
    with pytest.raises(CheckpointError, match="holds no text encoder beside its image encoder"):
        open_clip(tmp_path / "vision.safetensors", CPU)
    save_file({n: t for n, t in tensors.items() if n != "text_projection.weight"}, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="cannot compare words with pictures: its towers project to 0 and 48"):
        open_clip(tmp_path / "bare.safetensors", CPU)
    alone = tmp_path / "alone"
    alone.mkdir()
    save_file(seeing, alone / "model.safetensors")
    config = VISION.write(config_of_shapes({n: tuple(t.shape) for n, t in seeing.items()}))
    (alone / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="describes no whole CLIP"):
        open_clip(alone, CPU)
