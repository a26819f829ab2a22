"""Whole pictures under LoRAs, textual inversions, T2I-Adapters and IP-Adapters against diffusers' pipelines, asked for
as users do: by the fields of a request. Those under ControlNets are in test_controlnet_parity.

Tolerance 1e-3 of [0, 1], as in test_pictures.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import reverie
from reverie.engine.sources import data_url, to_tensor
from reverie.nets.unet import UNet
from tests import tiny
from tests.adapters import controls, driving, loras, pictured, sketched
from tests.parity.test_controlnet_parity import NEGATIVE, PROMPT, SIZE, control, pipeline, reference
from tests.parity.test_lora_parity import PIPELINES, noisy

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models; LoRAs and textual inversions for them are written besides."""
    folder = tmp_path_factory.mktemp("models")
    tiny.scheduler_of(tiny.DDIM).save_pretrained(tiny.model(folder, "sd1", merges_kept=500) / "scheduler")
    tiny.model(folder, "sdxl", merges_kept=500)
    return folder


@cache
def opened(folder: Path) -> reverie.Model:
    """Once for every picture of a model: adapters leave nothing behind."""
    return reverie.load(folder, device="cpu", precision="float32")


def drawn(folder: Path, *, negative: str = NEGATIVE, prompt: str = PROMPT, **fields: Any) -> Tensor:
    given: dict[str, Any] = {"width": SIZE, "height": SIZE, "steps": 6} | fields
    return opened(folder).generate(prompt, negative_prompt=negative, seed=5, guidance_scale=4.0, **given).pixels


def agree(got: Tensor, want: Tensor, without: Tensor) -> None:
    """Equal, and not because the adapter does nothing."""
    assert (got - want).abs().max() < TOLERANCE
    assert (without - want).abs().max() > 10 * TOLERANCE


# LoRA


def mild(root: Path, kind: str, name: str, dialect: str) -> Path:
    """A LoRA in every text encoder and in the U-Net, weak enough that pictures do not saturate."""
    path = root / f"{kind} {name}.safetensors"
    if not path.exists():
        found = loras.DIALECTS[kind][dialect](loras.parts_of(root, kind))
        assert {part for part, _ in found.layers} >= {"unet", "text_encoder"}
        ups = ("lora_up.weight", "lora_B.weight", ".up.weight")
        weak = {key: 0.2 * t if key.endswith(ups) else t for key, t in found.tensors.items()}
        loras.Written(weak, found.layers, found.metadata).save(path)
    return path


def under_loras(root: Path, kind: str, files: dict[Path, float]) -> Tensor:
    """Diffusers' picture; the LoRAs are side branches there."""
    with noisy():
        pipe = pipeline(PIPELINES[kind], root / kind)
        for i, path in enumerate(files):
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=f"a{i}")
        pipe.set_adapters([f"a{i}" for i in range(len(files))], list(files.values()))
        return reference(pipe, height=SIZE, width=SIZE)


@pytest.mark.parametrize(
    ("kind", "files"),
    [("sd1", {"kohya": 0.8, "diffusers": -0.35}), ("sdxl", {"kohya": 0.8})],
    ids=["sd1, two", "sdxl"],
)
def test_loras(root: Path, kind: str, files: dict[str, float]) -> None:
    """In the U-Net and in every text encoder; two at once with weights of their own; merged and beside."""
    paths = {mild(root, kind, dialect, dialect): weight for dialect, weight in files.items()}
    want, plain = under_loras(root, kind, paths), drawn(root / kind)
    for way in ("merge", "branch"):
        asked = [{"path": str(path), "strength": weight, "way": way} for path, weight in paths.items()]
        agree(drawn(root / kind, loras=asked), want, plain)


# Textual inversion


def test_textual_inversions(root: Path, tmp_path: Path) -> None:
    """One of several vectors in the prompt, one in the negative prompt, as diffusers loads them."""
    vectors = torch.Generator().manual_seed(1)
    toy, bad = (0.3 * torch.randn(count, 32, generator=vectors) for count in (3, 2))
    save_file({"<toy>": toy}, tmp_path / "toy.safetensors")
    torch.save({"string_to_param": {"*": bad}, "name": "bad"}, tmp_path / "bad.pt")
    pipe = pipeline(PIPELINES["sd1"], root / "sd1")
    pipe.load_textual_inversion(str(tmp_path / "toy.safetensors"))
    pipe.load_textual_inversion(str(tmp_path / "bad.pt"), token="<bad>")
    words = {"prompt": "a <toy> on a table", "negative_prompt": "blurry <bad>"}
    with torch.no_grad():
        given = pipe.encode_prompt(words["prompt"], "cpu", 1, True, negative_prompt=words["negative_prompt"])
    want = pipe(
        prompt_embeds=given[0], negative_prompt_embeds=given[1], guidance_scale=4.0, output_type="pt",
        generator=torch.Generator().manual_seed(5), num_inference_steps=6, height=SIZE, width=SIZE,
    ).images.permute(0, 2, 3, 1)  # fmt: skip
    asked = (str(tmp_path / "toy.safetensors"), f"<bad>={tmp_path / 'bad.pt'}")
    plain = drawn(root / "sd1", prompt=words["prompt"], negative=words["negative_prompt"])
    agree(drawn(root / "sd1", prompt=words["prompt"], negative=words["negative_prompt"], embeddings=asked), want, plain)


# T2I-Adapter, IP-Adapter


@pytest.mark.parametrize(
    ("family", "kind", "ours", "theirs"),
    [
        ("sd1", "full_adapter", {}, {}),
        ("ssd-1b", "full_adapter_xl", {"end": 0.5}, {"adapter_conditioning_factor": 0.5}),
    ],
)
def test_t2i_adapter(root: Path, family: str, kind: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """On XL during half of the steps."""
    folder = tiny.model(root, family, merges_kept=500)
    adapter = sketched.adapter(kind, widths=[32, 64] if family == "sd1" else None)
    adapter.save_pretrained(root / kind)
    name = "StableDiffusionXLAdapterPipeline" if family == "ssd-1b" else "StableDiffusionAdapterPipeline"
    seen = pictured.picture(size=(SIZE, SIZE))
    pipe = pipeline(name, folder, adapter=adapter)
    with noisy():
        want = pipe(
            PROMPT, negative_prompt=NEGATIVE, guidance_scale=4.0, num_inference_steps=6, image=to_tensor(seen),
            generator=torch.Generator().manual_seed(5), output_type="np", adapter_conditioning_scale=0.8, **theirs,
        ).images  # fmt: skip
    asked = control(root / kind, picture=data_url(seen), strength=0.8, **ours)
    agree(drawn(folder, controls=asked), torch.from_numpy(want), drawn(folder))


@pytest.fixture(scope="module")
def encoder(root: Path) -> Path:
    pictured.image_encoder().save_pretrained(root / "image_encoder")
    return root / "image_encoder"


def with_ip_adapter(root: Path, variant: str, name: str, **parts: Any) -> tuple[Any, Path]:
    """A pipeline with an IP-Adapter in it, and the adapter's file."""
    unet = loras.parts_of(root, "sd1").unet
    assert isinstance(unet, UNet)
    path = pictured.file_of(root, f"{variant}.safetensors", pictured.tensors(variant, unet))
    pipe = pipeline(
        name, root / "sd1", image_encoder=pictured.image_encoder(),
        feature_extractor=driving.image_processor(pictured.SIZE), **parts,
    )  # fmt: skip
    pipe.load_ip_adapter(str(root), subfolder="", weight_name=path.name, image_encoder_folder=None)
    return pipe, path


def test_ip_adapter(root: Path, encoder: Path) -> None:
    """With two pictures."""
    pipe, path = with_ip_adapter(root, "plus", PIPELINES["sd1"])
    pipe.set_ip_adapter_scale(0.7)
    seen = [pictured.picture(seed) for seed in range(2)]
    want = reference(pipe, ip_adapter_image=[seen], height=SIZE, width=SIZE)
    asked = {"pictures": list(map(data_url, seen)), "adapter": str(path), "encoder": str(encoder), "strength": 0.7}
    agree(drawn(root / "sd1", image_prompts=asked), want, drawn(root / "sd1"))


def test_all_at_once(root: Path, encoder: Path) -> None:
    """A LoRA in both networks, a ControlNet and an IP-Adapter."""
    network = controls.control(tiny.diffusers.UNet2DConditionModel.from_pretrained(root / "sd1" / "unet"))
    network.save_pretrained(root / "control")
    style, seen, shown = mild(root, "sd1", "diffusers", "diffusers"), pictured.picture(1), pictured.picture(2, (32, 32))
    pipe, path = with_ip_adapter(root, "plain", "StableDiffusionControlNetPipeline", controlnet=network)
    pipe.set_ip_adapter_scale(0.6)
    with noisy():
        pipe.load_lora_weights(str(root), weight_name=style.name, adapter_name="style")
        pipe.set_adapters(["style"], [0.5])
        want = reference(pipe, image=to_tensor(shown), ip_adapter_image=seen, controlnet_conditioning_scale=0.8)
    fields: dict[str, Any] = {
        "loras": f"{style}:0.5",
        "controls": control(root / "control", picture=data_url(shown), strength=0.8),
        "image_prompts": {"pictures": data_url(seen), "adapter": str(path), "encoder": str(encoder), "strength": 0.6},
    }
    for left_out in fields:
        without = drawn(root / "sd1", **{name: value for name, value in fields.items() if name != left_out})
        assert (without - want).abs().max() > 10 * TOLERANCE
    agree(drawn(root / "sd1", **fields), want, drawn(root / "sd1"))
