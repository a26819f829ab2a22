"""LoRA files against diffusers and peft: weights after merging, for every dialect that diffusers reads, and what it
makes of the files that we write.

Tolerance 1e-5 on weights of up to 10, with float32 products on both sides (largest difference seen: 1.9e-6).
"""

import importlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reverie.adapters.attach import Attachment, formed
from reverie.adapters.deltas import assembled
from reverie.adapters.lora import open_adapter
from reverie.adapters.lora_save import save_lora
from reverie.families.base import Parts
from tests.adapters import loras

TOLERANCE = 1e-5
PIPELINES = {
    "sd1": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline",
    "sd35-medium": "StableDiffusion3Pipeline",
}  # fmt: skip
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")  # where diffusers puts LoRAs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@contextmanager
def noisy() -> Iterator[None]:
    """diffusers warns of itself, transformers of torchvision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def merged_by_diffusers(root: Path, kind: str, files: Mapping[Path, float]) -> dict[str, dict[str, Tensor]]:
    """The weights of every part after LoRAs of these strengths are fused into them, without `text_model.`."""
    with noisy():
        pipe: Any = getattr(importlib.import_module("diffusers"), PIPELINES[kind]).from_pretrained(root / kind)
        for i, path in enumerate(files):
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=f"a{i}")
        there = [part for part in PARTS if getattr(pipe, part, None) is not None]
        pipe.set_adapters([f"a{i}" for i in range(len(files))], list(files.values()))
        pipe.fuse_lora(components=there)
        pipe.unload_lora_weights()
    return {part: bare(getattr(pipe, part).state_dict()) for part in there}


def bare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): t for name, t in tensors.items()}


def check(parts: Parts, files: Mapping[Path, float], theirs: dict[str, dict[str, Tensor]]) -> None:
    """Every weight is theirs, and at least one of each part that a file is for has changed."""
    attached = [Attachment(open_adapter(path, parts), scale, scale) for path, scale in files.items()]
    modules = parts.modules()
    touched = {part for attachment in attached for part in attachment.adapter.deltas}
    assert touched
    for part, want in theirs.items():
        ours = bare(formed(modules[part], part, attached, "merge").state_dict())
        before = bare(modules[part].state_dict())
        names = set(ours) & set(want)
        assert len(names) >= len(ours) - 2  # of `pos_embed` and the identity of CLIP-L's projection
        assert max((ours[name] - want[name]).abs().max().item() for name in names) < TOLERANCE
        assert (part in touched) == any(not torch.equal(ours[name], before[name]) for name in names)


@pytest.mark.parametrize(
    ("kind", "dialect"),
    [
        ("sd1", "kohya"), ("sd1", "diffusers with metadata"), ("sd1", "diffusers"), ("sd1", "processors"),
        ("sd1", "transformers 5"), ("sdxl", "kohya"), ("sdxl", "diffusers with metadata"),
        ("sd35-medium", "diffusers"),
    ],
)  # fmt: skip
def test_dialects(root: Path, tmp_path: Path, kind: str, dialect: str) -> None:
    """In both text encoders, too, and at a strength of its own."""
    parts = loras.parts_of(root, kind)
    written = loras.DIALECTS[kind][dialect](parts)
    kept = {key: f for key, f in written.layers.items() if key[0] != "text_encoder_3"}  # diffusers leaves T5 alone
    tensors = {name: t for name, t in written.tensors.items() if not name.startswith("text_encoder_3.")}
    path = loras.Written(tensors, kept, written.metadata).save(tmp_path / "a.safetensors")
    check(parts, {path: 0.7}, merged_by_diffusers(root, kind, {path: 0.7}))


def test_two_with_weights(root: Path, tmp_path: Path) -> None:
    """Of different dialects, one of them negative."""
    kind = "sd1"
    parts = loras.parts_of(root, kind)
    one = loras.DIALECTS[kind]["kohya"](parts).save(tmp_path / "one.safetensors")
    two = loras.diffusers_plain(parts).save(tmp_path / "two.safetensors")
    files = {one: 0.8, two: -0.35}
    check(parts, files, merged_by_diffusers(root, kind, files))


@pytest.mark.parametrize(("kind", "dialect"), [("sd1", "kohya"), ("sdxl", "diffusers")])
def test_files_that_we_write(root: Path, tmp_path: Path, kind: str, dialect: str) -> None:
    """diffusers loads them and merges what we do; ranks are mixed, alphas are not the ranks."""
    parts = loras.parts_of(root, kind)
    source = loras.kohya(parts).save(tmp_path / "source.safetensors")
    path = tmp_path / "written.safetensors"
    save_lora(open_adapter(source, parts).deltas, path, parts, dialect=dialect)
    check(parts, {path: 1.0}, merged_by_diffusers(root, kind, {path: 1.0}))


def test_dora(root: Path, tmp_path: Path) -> None:
    """In diffusers' dialect, the one in which it reads DoRA, and at strength 1: peft interpolates otherwise."""
    parts = loras.parts_of(root, "sd1")
    deltas: dict[str, Any] = {"unet": {}}
    for (part, layer), f in loras.layers_of(parts, loras.ATTENTION, None, rank=4).items():
        weight = parts.modules()[part].get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        scale = torch.rand(len(weight), 1, generator=torch.Generator().manual_seed(1)) + 0.5
        tensors = {"lora_down.weight": f.down[:4], "lora_up.weight": f.up[:, :4], "dora_scale": scale}
        deltas[part][layer] = assembled(tensors, 4.0, weight.shape)
    path = tmp_path / "dora.safetensors"
    save_lora(deltas, path, parts, dialect="diffusers")
    check(parts, {path: 1.0}, merged_by_diffusers(root, "sd1", {path: 1.0}))
