"""CLIP's image encoder and its preprocessing against transformers.

Tolerances: 1e-5 of the largest number for the network, as in test_nets; pixels to 1e-6 (both round to 8 bits after the
same filter of Pillow, then float32 arithmetic in another order).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reverie.errors import CheckpointError
from reverie.families.vision import config_of_shapes, open_clip_vision, vision_config, vision_json, vision_of
from reverie.nets.clip_vision import ClipVision, clip_pixels
from tests import tiny
from tests.adapters import driving, pictured
from tests.parity.test_nets import RELATIVE, difference, shaken

# laion's H/14 and bigG/14, openai's L/14: `vision_config` of their config.json.
L: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
H = L | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1024,
         "hidden_act": "gelu"}  # fmt: skip
BIG_G = L | {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "projection_dim": 1280,
             "hidden_act": "gelu"}  # fmt: skip
PUBLISHED = {"L/14": L, "H/14": H, "bigG/14": BIG_G}
MILLIONS = {"L/14": 304, "H/14": 632, "bigG/14": 1845}  # of parameters: OpenCLIP's table of models, image tower


def encoder(**settings: Any) -> Any:
    return shaken(pictured.image_encoder(**settings))


def compared(ours: ClipVision, reference: Any) -> None:
    pixels = driving.rand(2, 3, pictured.SIZE, pictured.SIZE)
    with torch.no_grad():
        want = reference(pixels, output_hidden_states=True)
        assert difference(ours(pixels), want.image_embeds) < RELATIVE
        assert difference(ours.states(pixels), want.last_hidden_state) < RELATIVE
        assert difference(ours.states(pixels, 1), want.hidden_states[-2]) < RELATIVE


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_folder(tmp_path: Path, activation: str) -> None:
    reference = encoder(hidden_act=activation)
    reference.save_pretrained(tmp_path / "image_encoder")
    compared(open_clip_vision(tmp_path / "image_encoder"), reference)
    compared(open_clip_vision(tmp_path), reference)  # the model's folder that it is in


def test_whole_clip(tmp_path: Path) -> None:
    """The folder of a CLIP with both encoders."""
    text = tiny.text_encoder(vocab_size=99, hidden_size=32, num_attention_heads=2).config
    config = tiny.transformers.CLIPConfig(text_config=text.to_dict(), vision_config=pictured.ENCODER, projection_dim=48)
    torch.manual_seed(0)
    whole = tiny.transformers.CLIPModel(config).eval()
    whole.save_pretrained(tmp_path)
    got = open_clip_vision(tmp_path)
    pixels = driving.rand(2, 3, pictured.SIZE, pictured.SIZE)
    with torch.no_grad():
        pooled = whole.vision_model(pixels).pooler_output
        assert difference(got(pixels), whole.visual_projection(pooled)) < RELATIVE


@pytest.mark.parametrize("layout", ["transformers", "OpenCLIP", "in a model"])
def test_single_file(tmp_path: Path, layout: str) -> None:
    """Shapes tell all but the heads, of which published encoders have 16, and the activation."""
    wide = {"num_attention_heads": 16, "hidden_act": "quick_gelu"}
    reference, path = encoder(**wide), tmp_path / "clip.safetensors"
    tensors = reference.state_dict()
    if layout == "in a model":
        whole = {"model.diffusion_model.out.2.bias": torch.ones(4)}
        tensors = tiny.open_clip_vision(tensors, "embedder.model.visual.") | whole
    elif layout == "OpenCLIP":
        tensors = tiny.open_clip_vision(tensors) | {"logit_scale": torch.ones(()), "ln_final.weight": torch.ones(3)}
    save_file(tensors, path)
    compared(open_clip_vision(path), reference)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_true_size(name: str) -> None:
    """Names, shapes and number of parameters; and the config, back from shapes alone."""
    config = vision_config({"model_type": "clip_vision_model", **PUBLISHED[name]})
    with torch.device("meta"):
        ours = ClipVision(config)
        theirs = tiny.transformers.CLIPVisionModelWithProjection(tiny.transformers.CLIPVisionConfig(**PUBLISHED[name]))
    shapes = {n: tuple(t.shape) for n, t in ours.state_dict().items()}
    assert shapes == {n: tuple(t.shape) for n, t in theirs.state_dict().items()}
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6) == pytest.approx(MILLIONS[name], rel=0.01)
    assert vision_config(vision_json(config)) == config
    assert config_of_shapes(shapes) == config


@pytest.mark.parametrize("size", [(45, 33), (33, 45), (224, 224), (517, 301), (20, 27), (1000, 231)])
@pytest.mark.parametrize("target", [224, 28])
def test_pixels(size: tuple[int, int], target: int) -> None:
    picture = pictured.picture(1, size)
    want = driving.image_processor(target)(picture, return_tensors="pt").pixel_values
    assert (clip_pixels(picture, target) - want).abs().max() < 1e-6


def test_pixels_of_grey_and_palettes() -> None:
    for mode in ("L", "P"):
        picture = pictured.picture().convert(mode)
        want = np.array(driving.image_processor(28)(picture).pixel_values)
        assert np.abs(clip_pixels(picture, 28).numpy() - want).max() < 1e-6


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_clip_vision(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "clip.safetensors"
    save_file({"text_model.final_layer_norm.weight": torch.ones(3)}, path)
    assert "holds no image encoder" in refusal(path)
    tensors = encoder().state_dict()
    name = "vision_model.embeddings.position_embedding.weight"
    save_file(tensors | {name: torch.ones(4, 64)}, path)
    assert "4 positions; expected one more than a square number" in refusal(path)
    save_file({n: t for n, t in tensors.items() if "layers.1.mlp.fc1.bias" not in n}, path)
    assert "1 tensor (vision_model.encoder.layers.1.mlp.fc1.bias) missing" in refusal(path)
    folder = tmp_path / "siglip"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    save_file(tensors, folder / "model.safetensors")
    assert "model_type is 'siglip_vision_model'" in refusal(folder)


def test_an_encoder_is_described_before_it_is_built(tmp_path: Path) -> None:
    encoder().save_pretrained(tmp_path)
    assert vision_of(tmp_path).config.width == 64
