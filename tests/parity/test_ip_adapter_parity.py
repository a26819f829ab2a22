"""IP-Adapters against diffusers: same file, same pictures, same latents.

Tolerance 1e-3 on latents of up to 30 after four guided steps.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from reverie.adapters.ip_adapter import ImagePrompt, area, image_prompted, tokens
from reverie.adapters.ip_adapter_file import IpAdapter, open_ip_adapter
from reverie.families.base import Parts
from reverie.families.vision import open_clip_vision
from reverie.nets.clip_vision import ClipVision
from reverie.nets.unet import UNet
from reverie.sampling.guidance import Clock
from reverie.types import Cond, Predict
from tests import tiny
from tests.adapters import driving, pictured

TOLERANCE = 1e-3
PIPELINES = {"sd1": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ip")
    pictured.image_encoder().save_pretrained(folder / "image_encoder")
    return folder


@pytest.fixture(scope="module")
def vision(root: Path) -> ClipVision:
    return open_clip_vision(root / "image_encoder")


def opened(root: Path, family: str) -> tuple[Any, Parts]:
    """A pipeline with an image encoder, and our networks."""
    folder = tiny.model(root, family, merges_kept=500)
    parts = driving.parts_of(folder)
    pipe = driving.oracle(
        folder, PIPELINES[family], image_encoder=pictured.image_encoder(),
        feature_extractor=driving.image_processor(pictured.SIZE),
    )  # fmt: skip
    return pipe, parts


def drawn(parts: Parts, prompts: Sequence[ImagePrompt], **settings: Any) -> Tensor:
    def extend(cond: Cond, role: str) -> Cond:
        return replace(cond, images=tuple(getattr(prompt, role) for prompt in prompts))

    def wrap(predict: Predict, clock: Clock) -> Predict:
        return image_prompted(predict, prompts, clock)

    return driving.ours(parts, driving.embeddings(parts)[1], wrap, extend, **settings)


def adapter_of(root: Path, pipe: Any, parts: Parts, names: Sequence[str], kinds: Sequence[str]) -> list[IpAdapter]:
    """Adapters with random weights, in files that diffusers has loaded, too."""
    assert isinstance(parts.unet, UNet)
    for seed, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        pictured.file_of(root, name, pictured.tensors(kind, parts.unet, seed))
    pipe.load_ip_adapter(str(root), subfolder="", weight_name=list(names), image_encoder_folder=None)
    return [open_ip_adapter(root / name, parts) for name in names]


def same(got: Tensor, want: Tensor, parts: Parts) -> bool:
    """Equal, and not because the adapter does nothing."""
    without = driving.ours(parts, driving.embeddings(parts)[1])
    assert (without - want).abs().max() > 100 * TOLERANCE
    return bool((got - want).abs().max() < TOLERANCE)


@pytest.mark.parametrize(
    ("family", "kind", "ending"),
    [
        *(("sd1", kind, "safetensors") for kind in ("plain", "full", "plus")),
        ("sd1", "plus", "bin"), ("sdxl", "plain", "bin"), ("sdxl", "plus", "safetensors"),
    ],
)  # fmt: skip
def test_one_picture(root: Path, vision: ClipVision, family: str, kind: str, ending: str) -> None:
    pipe, parts = opened(root, family)
    [adapter] = adapter_of(root, pipe, parts, [f"{family}-{kind}.{ending}"], [kind])
    pipe.set_ip_adapter_scale(0.7)
    want = driving.reference(pipe, driving.embeddings(parts)[0], ip_adapter_image=pictured.picture())
    prompt = ImagePrompt(adapter, *tokens(adapter, vision, [pictured.picture()]), weight=0.7)
    assert same(drawn(parts, [prompt]), want, parts)


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_two_pictures(root: Path, vision: ClipVision, kind: str) -> None:
    pipe, parts = opened(root, "sd1")
    [adapter] = adapter_of(root, pipe, parts, ["two.safetensors"], [kind])
    pictures = [pictured.picture(1), pictured.picture(2)]
    want = driving.reference(pipe, driving.embeddings(parts)[0], ip_adapter_image=[pictures])
    assert same(drawn(parts, [ImagePrompt(adapter, *tokens(adapter, vision, pictures))]), want, parts)


def test_two_adapters_of_their_own_weights(root: Path, vision: ClipVision) -> None:
    pipe, parts = opened(root, "sd1")
    adapters = adapter_of(root, pipe, parts, ["first.safetensors", "second.bin"], ["plain", "plus"])
    pipe.set_ip_adapter_scale([0.4, 0.9])
    pictures = [pictured.picture(1), pictured.picture(2)]
    want = driving.reference(pipe, driving.embeddings(parts)[0], ip_adapter_image=pictures)
    prompts = [
        ImagePrompt(adapter, *tokens(adapter, vision, [picture]), weight=weight)
        for adapter, picture, weight in zip(adapters, pictures, (0.4, 0.9), strict=True)
    ]
    assert same(drawn(parts, prompts), want, parts)


def mask(box: tuple[int, int, int, int]) -> Image.Image:
    found = Image.new("L", (32, 48))
    ImageDraw.Draw(found).rectangle(box, fill=255)
    return found


@pytest.mark.parametrize("pictures", [1, 2])
def test_masks(root: Path, vision: ClipVision, pictures: int) -> None:
    """Each picture acts where its mask is white."""
    pipe, parts = opened(root, "sd1")
    [adapter] = adapter_of(root, pipe, parts, ["masked.safetensors"], ["plain"])
    masks = [mask((0, 0, 15, 30)), mask((10, 20, 31, 47))][:pictures]
    seen = [pictured.picture(n) for n in range(pictures)]
    processor = tiny.diffusers.image_processor.IPAdapterMaskProcessor(vae_scale_factor=4)
    theirs = processor.preprocess(masks, height=48, width=32).reshape(1, pictures, 48, 32)
    want = driving.reference(
        pipe, driving.embeddings(parts)[0], ip_adapter_image=[seen],
        cross_attention_kwargs={"ip_adapter_masks": [theirs]},
    )  # fmt: skip
    areas = torch.cat([area(each, 32, 48) for each in masks])
    assert torch.equal(areas, theirs[0])
    assert same(drawn(parts, [ImagePrompt(adapter, *tokens(adapter, vision, seen), mask=areas)]), want, parts)


# The tiny SDXL has a level less than the true one.
BLOCKS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "one block": ({"up": {"block_0": [0.0, 1.0, 0.0]}}, {"up.0.1": 1.0}),
    "two blocks": (
        {"up": {"block_0": [0.0, 0.6, 0.0]}, "down": {"block_1": [0.0, 1.0]}},
        {"up.0.1": 0.6, "down.1.1": 1.0},
    ),
}


@pytest.mark.parametrize("name", list(BLOCKS))
def test_blocks(root: Path, vision: ClipVision, name: str) -> None:
    """InstantStyle: the picture acts in some blocks alone."""
    pipe, parts = opened(root, "sdxl")
    [adapter] = adapter_of(root, pipe, parts, ["blocks.safetensors"], ["plain"])
    theirs, blocks = BLOCKS[name]
    pipe.set_ip_adapter_scale(theirs)
    want = driving.reference(pipe, driving.embeddings(parts)[0], ip_adapter_image=pictured.picture())
    prompt = ImagePrompt(adapter, *tokens(adapter, vision, [pictured.picture()]), blocks=blocks)
    assert (drawn(parts, [prompt]) - want).abs().max() < TOLERANCE


def test_until_half_of_the_steps(root: Path, vision: ClipVision) -> None:
    pipe, parts = opened(root, "sd1")
    [adapter] = adapter_of(root, pipe, parts, ["half.safetensors"], ["plain"])

    def off(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe.set_ip_adapter_scale(0.0 if step >= driving.STEPS // 2 - 1 else 1.0)
        return kwargs

    want = driving.reference(
        pipe, driving.embeddings(parts)[0], ip_adapter_image=pictured.picture(), callback_on_step_end=off
    )
    prompt = ImagePrompt(adapter, *tokens(adapter, vision, [pictured.picture()]), end=0.5)
    assert same(drawn(parts, [prompt]), want, parts)


@pytest.mark.parametrize(("kind", "shortcut"), [("face", False), ("face_plus", False), ("face_plus", True)])
def test_faces(root: Path, vision: ClipVision, kind: str, shortcut: bool) -> None:
    """FaceID: a face by its embedding; plus: by its picture, too; v2 is known by its name."""
    pipe, parts = opened(root, "sd1")
    name = f"faceid-{'plusv2' if shortcut else 'plus'}.safetensors"
    [adapter] = adapter_of(root, pipe, parts, [name], [kind])
    face = driving.rand(1, 512, seed=9)
    given = torch.stack([torch.zeros_like(face), face])
    if kind == "face_plus":
        pixels = driving.image_processor(pictured.SIZE)(pictured.picture(), return_tensors="pt").pixel_values
        both = torch.cat([torch.zeros_like(pixels), pixels])
        states = pipe.image_encoder(both, output_hidden_states=True).hidden_states[-2]
        layer = pipe.unet.encoder_hid_proj.image_projection_layers[0]
        layer.clip_embeds, layer.shortcut = states[:, None], shortcut
    want = driving.reference(pipe, driving.embeddings(parts)[0], ip_adapter_image_embeds=[given])
    prompt = ImagePrompt(adapter, *tokens(adapter, vision, [pictured.picture()], face))
    assert same(drawn(parts, [prompt]), want, parts)


@pytest.mark.parametrize("kind", ["plain", "full", "plus", "face", "face_plus"])
def test_layout_of_diffusers(root: Path, kind: str) -> None:
    """What diffusers has made of a file, written under its names, opens as the same adapter."""
    pipe, parts = opened(root, "sd1")
    [adapter] = adapter_of(root, pipe, parts, [f"again-{kind}.safetensors"], [kind])
    theirs = {name: t for name, t in pipe.unet.state_dict().items() if "_ip." in name or "encoder_hid_proj" in name}
    path = pictured.file_of(root, f"diffusers-{kind}.safetensors", theirs)
    again = open_ip_adapter(path, parts).network.state_dict()
    assert list(again) == list(adapter.network.state_dict())
    assert all(torch.equal(again[name], t) for name, t in adapter.network.state_dict().items())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_at_the_size_of_stable_diffusion_1_5(root: Path, vision: ClipVision) -> None:
    """Every level and place of the published U-Net; two steps of 16 x 16 latents."""
    folder = tiny.model(root, "sd1", merges_kept=500)
    unet, parts = driving.at_true_size(folder)
    pipe = driving.oracle(
        folder, PIPELINES["sd1"], unet=unet, image_encoder=pictured.image_encoder(),
        feature_extractor=driving.image_processor(pictured.SIZE),
    )  # fmt: skip
    [adapter] = adapter_of(root, pipe, parts, ["large.safetensors"], ["plus"])
    settings: dict[str, Any] = {"size": (64, 64), "steps": 2}
    given, conditions = driving.embeddings(parts)
    want = driving.reference(pipe, given, ip_adapter_image=pictured.picture(), **settings)
    got = drawn(parts, [ImagePrompt(adapter, *tokens(adapter, vision, [pictured.picture()]))], **settings)
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()
    assert (driving.ours(parts, conditions, **settings) - want).abs().max() > 10 * TOLERANCE * want.abs().max()
