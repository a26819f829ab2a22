"""Pictures at the true size of the published models, with random weights: 64 x 64 pixels in 2 steps.

Tolerance: 1e-3 of [0, 1] on float32 pixels. The weights are float16 in the files and computed with in float32; each
side runs in a process of its own, because both together would not fit into 24 GB. Peak memory about 18 GB, mapped
files counted.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import reverie
from reverie.families.detect import load_parts
from tests import tiny
from tests.adapters import loras
from tests.families import published
from tests.tiny import diffusers, transformers
from tests.vocabulary import tokenizer_folder

PROMPT, NEGATIVE = "a red apple on a table", "blurry"
COMMON: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 64, "width": 64}
V = tiny.DDIM | {"prediction_type": "v_prediction"}
TEXT: dict[str, Callable[[Any], Any]] = {
    "CLIPTextModel": transformers.CLIPTextModel,
    "CLIPTextModelWithProjection": transformers.CLIPTextModelWithProjection,
}

# Pipeline, denoising network, VAE, text encoders with their classes, scheduler.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[tuple[dict[str, Any], str]], dict[str, Any]]] = {
    "sd1.5": (
        "StableDiffusionPipeline", published.UNETS["stable-diffusion-v1-5"], published.VAE,
        [(published.CLIP_L, "CLIPTextModel")], tiny.DDIM,
    ),
    "sd2.1": (
        "StableDiffusionPipeline", published.UNETS["stable-diffusion-2-1"], published.VAE,
        [(published.OPEN_CLIP_H, "CLIPTextModel")], V,
    ),
    "sdxl": (
        "StableDiffusionXLPipeline", published.UNETS["stable-diffusion-xl-base-1.0"],
        published.VAES["stable-diffusion-xl-base-1.0"],
        [(published.CLIP_L, "CLIPTextModel"), (published.OPEN_CLIP_G, "CLIPTextModelWithProjection")], tiny.EULER,
    ),
    "sd3.5-medium": (
        "StableDiffusion3Pipeline", published.TRANSFORMERS["stable-diffusion-3.5-medium"],
        published.VAES["stable-diffusion-3-medium-diffusers"],
        [(published.CLIP_L, "CLIPTextModelWithProjection"), (published.OPEN_CLIP_G, "CLIPTextModelWithProjection")],
        tiny.FLOW,
    ),
}  # fmt: skip


def make(kind: str, folder: Path) -> None:
    """Write the folder, part by part, in float16."""
    pipeline, network, vae, texts, scheduler = KINDS[kind]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    transformer = "num_attention_heads" in network
    name, made = ("transformer", "SD3Transformer2DModel") if transformer else ("unet", "UNet2DConditionModel")
    getattr(diffusers, made)(**network).save_pretrained(folder / name)
    diffusers.AutoencoderKL(**vae).save_pretrained(folder / "vae")
    index: dict[str, Any] = {
        "_class_name": pipeline, name: ["diffusers", made], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler["_class_name"]], "force_zeros_for_empty_prompt": True,
    }  # fmt: skip
    for part in ("safety_checker", "feature_extractor", "image_encoder", "text_encoder_3", "tokenizer_3"):
        index[part] = [None, None]
    for i, (config, kind_of_text) in enumerate(texts):
        end = f"_{i + 1}" if i else ""
        TEXT[kind_of_text](transformers.CLIPTextConfig(**config)).save_pretrained(folder / f"text_encoder{end}")
        tokenizer_folder(folder / f"tokenizer{end}", pad="!" if config["hidden_act"] == "gelu" else "<|endoftext|>")
        index |= {
            f"text_encoder{end}": ["transformers", kind_of_text],
            f"tokenizer{end}": ["transformers", "CLIPTokenizer"],
        }
    torch.set_default_dtype(torch.float32)
    tiny.scheduler_of(scheduler).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


@torch.no_grad()
def draw(folder: Path) -> None:
    """What diffusers draws: first the prompt, then the picture, so that not all networks are there at once."""
    pipeline = getattr(diffusers, json.loads((folder / "model_index.json").read_text())["_class_name"])
    network = "transformer" if (folder / "transformer").exists() else "unet"
    texts = [name for name in ("text_encoder", "text_encoder_2") if (folder / name).exists()]
    instead: Any = None
    without: dict[str, Any] = {}
    if network == "transformer":  # which is asked for the width of the prompt
        kind = diffusers.SD3Transformer2DModel
        with torch.device("meta"):
            instead = kind.from_config(kind.load_config(folder / network))
        without = {"text_encoder_3": None, "tokenizer_3": None}
    words = pipeline.from_pretrained(folder, torch_dtype=torch.float32, **{network: instead, "vae": None}, **without)
    prompts = [PROMPT] * (3 if network == "transformer" else 1)
    given = {"negative_prompt": NEGATIVE, "do_classifier_free_guidance": True, "device": "cpu"}
    found = words.encode_prompt(*prompts, num_images_per_prompt=1, **given)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    del words
    without |= {name: None for text in texts for name in (text, text.replace("text_encoder", "tokenizer"))}
    pipe = pipeline.from_pretrained(folder, torch_dtype=torch.float32, **without)
    result = pipe(**dict(zip(names, found, strict=False)), **COMMON, output_type="pt",
                  generator=torch.Generator().manual_seed(3))  # fmt: skip
    torch.save(result.images.permute(0, 2, 3, 1).float(), folder / "want.pt")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", list(KINDS))
def test_picture(tmp_path: Path, kind: str) -> None:
    for step in ("make", "draw"):
        subprocess.run([sys.executable, "-m", "tests.parity.test_true_pictures", step, kind, str(tmp_path)], check=True)
    model = reverie.load(tmp_path, device="cpu", precision="float32", offload=True)
    got = model.generate(
        PROMPT, negative_prompt=NEGATIVE, steps=2, guidance_scale=5.0, seed=3, width=64, height=64
    ).pixels
    difference = (got - torch.load(tmp_path / "want.pt")).abs().max()
    print(f"{kind}: largest difference {float(difference):.2g}")
    assert difference < 1e-3


# Adapters

LORAS = {"one.safetensors": 0.8, "two.safetensors": -0.4}
EMBEDDED = "a <toy> on a table"


def equip(folder: Path) -> None:
    """Write two LoRAs of every layer, of U-Net and text encoder, and a textual inversion of three vectors."""
    parts = load_parts(folder)
    for name, dialect in zip(LORAS, (loras.kohya, loras.diffusers_peft), strict=True):
        found = dialect(parts)
        ups = ("lora_up.weight", "lora_B.weight")
        weak = {name: 0.01 * t if name.endswith(ups) else t for name, t in found.tensors.items()}
        loras.Written(weak, found.layers, found.metadata).save(folder / name)
    vectors = 0.02 * torch.randn(3, 768, generator=torch.Generator().manual_seed(1))
    save_file({"<toy>": vectors}, folder / "toy.safetensors")


@torch.no_grad()
def draw_equipped(folder: Path) -> None:
    """What diffusers draws with them."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    for name in LORAS:
        pipe.load_lora_weights(str(folder), weight_name=name, adapter_name=Path(name).stem)
    pipe.set_adapters([Path(name).stem for name in LORAS], list(LORAS.values()))
    pipe.load_textual_inversion(str(folder / "toy.safetensors"))
    result = pipe(EMBEDDED, negative_prompt=NEGATIVE, **COMMON, output_type="pt",
                  generator=torch.Generator().manual_seed(3))  # fmt: skip
    torch.save(result.images.permute(0, 2, 3, 1).float(), folder / "want.pt")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_picture_with_adapters(tmp_path: Path) -> None:
    """Two LoRAs and a textual inversion at the size of Stable Diffusion 1.5, merged and beside the layers."""
    for step in ("make", "equip", "draw_equipped"):
        run = [sys.executable, "-m", "tests.parity.test_true_pictures", step, "sd1.5", str(tmp_path)]
        subprocess.run(run, check=True)
    model, want = reverie.load(tmp_path, device="cpu", precision="float32"), torch.load(tmp_path / "want.pt")
    fields: dict[str, Any] = {
        "negative_prompt": NEGATIVE,
        "steps": 2,
        "guidance_scale": 5.0,
        "seed": 3,
        "width": 64,
        "height": 64,
    }
    for way in ("merge", "branch"):
        asked = [{"path": str(tmp_path / name), "strength": s, "way": way} for name, s in LORAS.items()]
        got = model.generate(EMBEDDED, loras=asked, embeddings=(str(tmp_path / "toy.safetensors"),), **fields).pixels
        difference = (got - want).abs().max()
        print(f"sd1.5 with adapters, {way}: largest difference {float(difference):.2g}")
        assert difference < 1e-3
    plain = model.generate(EMBEDDED, **fields).pixels
    print(f"without: {float((plain - want).abs().max()):.2g}")
    assert (plain - want).abs().max() > 1e-2


if __name__ == "__main__":
    step, kind, where = sys.argv[1:]
    if step == "make":
        make(kind, Path(where))
    else:
        {"draw": draw, "equip": equip, "draw_equipped": draw_equipped}[step](Path(where))
