"""Every family and variant, from a folder and from a single file: whose it is, why, and every tensor in its place.

The folders are made by diffusers and transformers, the single files by the map of the tests (tests/tiny.py).
"""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reverie.errors import CheckpointError
from reverie.families.base import Parts
from reverie.families.detect import load_parts
from reverie.families.family import FAMILIES
from reverie.families.pieces import tidied_clip
from reverie.nets.autoencoder import AutoencoderConfig
from tests import tiny
from tests.families.models import file_of, folder_of, loaded

# (family, variant, prediction type of the folder, prediction type of the single file)
KNOWN = {
    "sd1": ("sd1", "", "epsilon", "epsilon"),
    "sd1-inpaint": ("sd1", "inpaint", "epsilon", "epsilon"),
    "sd1-pix2pix": ("sd1", "pix2pix", "epsilon", "epsilon"),
    "bk-sdm-small": ("sd1", "", "epsilon", "epsilon"),
    "tiny-sd": ("sd1", "", "epsilon", "epsilon"),
    "sd2": ("sd2", "", "epsilon", "epsilon"),
    "sd2-v": ("sd2", "", "v_prediction", "epsilon"),  # a file that says nothing; see test_prediction.py
    "sd2-inpaint": ("sd2", "inpaint", "epsilon", "epsilon"),
    "sd2-depth": ("sd2", "depth", "epsilon", "epsilon"),
    "unclip": ("sd2", "unclip", "v_prediction", "v_prediction"),
    "x4-upscaler": ("sd2", "x4-upscaler", "v_prediction", "v_prediction"),
    "sdxl": ("sdxl", "", "epsilon", "epsilon"),
    "sdxl-inpaint": ("sdxl", "inpaint", "epsilon", "epsilon"),
    "sdxl-pix2pix": ("sdxl", "pix2pix", "epsilon", "epsilon"),
    "refiner": ("sdxl", "refiner", "epsilon", "epsilon"),
    "ssd-1b": ("sdxl", "", "epsilon", "epsilon"),
    "koala": ("sdxl", "", "epsilon", "epsilon"),
    "playground": ("sdxl", "", "edm", "edm"),
}
KINDS = [*KNOWN, *tiny.SD3_KINDS]


def weights(parts: Parts) -> dict[str, Tensor]:
    modules = parts.modules()
    return {f"{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}


def written(folder: Path) -> dict[str, Tensor]:
    """What diffusers and transformers wrote."""
    found: dict[str, Tensor] = {}
    for part in sorted(path.name for path in folder.iterdir() if (path / "config.json").exists()):
        tensors = tiny.read(folder / part)
        if part.startswith("text_encoder") and part != "text_encoder_3":
            tensors = tidied_clip(tensors)
        found |= {f"{part}.{name}": t for name, t in tensors.items()}
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


@pytest.mark.parametrize("kind", [*KINDS, "lcm"])
def test_folder(root: Path, kind: str) -> None:
    parts = loaded(folder_of(root, kind))
    assert_same(weights(parts), written(folder_of(root, kind)))
    family, variant, prediction, _ = KNOWN.get(kind, ("sd3", "", "flow_prediction", ""))
    if kind == "lcm":
        family, prediction = "sd1", "epsilon"
    identity = parts.identity
    assert (identity.family, identity.variant, identity.prediction) == (family, variant, prediction)
    assert identity.layout == "diffusers folder"
    assert identity.files.keys() == parts.modules().keys()
    claims = dict(identity.evidence)
    assert "model_index.json" in claims[f"family {family}"]
    assert f"prediction {prediction}" in claims
    assert parts.guidance_told == (kind == "lcm")


@pytest.mark.parametrize("kind", KINDS)
def test_single_file(root: Path, kind: str) -> None:
    path = file_of(root, kind)
    parts = load_parts(path)
    assert_same(weights(parts), weights(loaded(folder_of(root, kind))))
    family, variant, _, prediction = KNOWN.get(kind, ("sd3", "", "", "flow_prediction"))
    identity = parts.identity
    assert (identity.family, identity.variant, identity.prediction) == (family, variant, prediction)
    assert identity.layout == "single file (LDM)"
    assert set(identity.files.values()) == {(path,)}
    assert identity.files.keys() == parts.modules().keys()


def same_numbers(a: AutoencoderConfig, b: AutoencoderConfig) -> bool:
    """Equal, but that statistics which a file holds are float32."""
    statistics = ("latents_mean", "latents_std")
    assert all(getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-6) for name in statistics)
    return replace(a, latents_mean=(), latents_std=()) == replace(b, latents_mean=(), latents_std=())


@pytest.mark.parametrize("kind", KINDS)
def test_both_layouts_say_the_same(root: Path, kind: str) -> None:
    """Scales, noise process, tokenizers and defaults, but for what a folder's own configs say."""
    folder, file = loaded(folder_of(root, kind)), loaded(file_of(root, kind))
    assert same_numbers(file.vae.config, folder.vae.config)
    assert [tower.module.config for tower in file.towers] == [tower.module.config for tower in folder.towers]
    assert [(t.name, t.tokenizer.max_length) for t in file.towers] == [
        (t.name, t.tokenizer.max_length) for t in folder.towers
    ]
    if kind != "sd2-v":
        assert torch.equal(file.process.sigmas, folder.process.sigmas)
        same = ("sampler", "spacing", "rules", "options", "spacing_options", "steps", "guidance_scale")
        assert {name: getattr(file.defaults, name) for name in same} == {
            name: getattr(folder.defaults, name) for name in same
        }
    assert (file.zero_empty, file.network, file.guidance_told) == (
        folder.zero_empty, folder.network, folder.guidance_told,
    )  # fmt: skip
    if kind not in tiny.SD3_KINDS:  # the training size, which places are counted from, is in the JSON alone
        assert file.unet.config == folder.unet.config


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_the_published_tokenizers_are_those_of_the_folder(tmp_path: Path, kind: str) -> None:
    """Also what the second encoder pads with."""
    folder = tiny.model(tmp_path, kind) if kind == "sdxl" else tiny.sd3_model(tmp_path, kind)
    file = tiny.model_file(tmp_path, kind) if kind == "sdxl" else tiny.sd3_file(tmp_path, kind)
    for a, b in zip(load_parts(file).towers, load_parts(folder).towers, strict=True):
        assert a.tokenizer("a red apple, 猫").ids == b.tokenizer("a red apple, 猫").ids
    ids = [tower.tokenizer("").ids[-1] for tower in load_parts(file).towers]
    assert ids == [49407, 0, 0][: len(ids)]


# The converters of diffusers

single_file_utils: Any = import_module("diffusers.loaders.single_file_utils")


@pytest.mark.parametrize("kind", [k for k in KNOWN if k not in {"bk-sdm-small", "tiny-sd"}])
def test_as_diffusers_converts_it(root: Path, kind: str) -> None:
    """Its converters keep what they know: every tensor of the U-Net and of the VAE."""
    folder, file = folder_of(root, kind), load_file(file_of(root, kind))
    unet = tiny.diffusers.UNet2DConditionModel.load_config(folder / "unet")
    vae = tiny.diffusers.AutoencoderKL.load_config(folder / "vae")
    parts = loaded(file_of(root, kind))
    assert_same(parts.unet.state_dict(), single_file_utils.convert_ldm_unet_checkpoint(dict(file), unet))
    assert_same(parts.vae.state_dict(), single_file_utils.convert_ldm_vae_checkpoint(dict(file), vae))


@pytest.mark.parametrize(
    ("kind", "part"), [("sdxl", "text_encoder_2"), ("refiner", "text_encoder_2"), ("sd2", "text_encoder")]
)
def test_text_encoders_as_diffusers_converts_them(root: Path, kind: str, part: str) -> None:
    """OpenCLIP's names, stacked projections and transposed matrix, by `convert_open_clip_checkpoint`."""
    file = load_file(file_of(root, kind))
    prefix, open_clip = tiny.RECIPES[kind].places[part]
    assert open_clip
    if kind == "sd2":
        file.pop(f"{prefix}text_projection")  # not used, and of a shape that would confuse the converter
    settings = {name: value for name, value in tiny.RECIPES[kind].texts[part].items() if name != "projection_dim"}
    converted = single_file_utils.convert_open_clip_checkpoint(tiny.text_encoder(**settings), file, prefix=prefix)
    converted = {name: t for name, t in converted.items() if not name.startswith("text_model.encoder.layers.23.")}
    assert_same(loaded(file_of(root, kind)).modules()[part].state_dict(), tidied_clip(converted))


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(root: Path, kind: str) -> None:
    """A single file of what was loaded is the file again, but for what no picture needs."""
    parts = loaded(file_of(root, kind))
    named = {part: (module.config, dict(module.state_dict())) for part, module in parts.modules().items()}
    written = FAMILIES[parts.identity.family].join_file(named)
    file = load_file(file_of(root, kind))
    extra = tiny.RECIPES[kind].extra if kind in tiny.RECIPES else {}
    assert_same(written, {n: t for n, t in file.items() if n not in extra and n != "alphas_cumprod"})


# Files and folders that are not whole


def cut(source: Path, target: Path, *prefixes: str) -> Path:
    """A copy without the tensors that begin so."""
    save_file({n: t for n, t in load_file(source).items() if not n.startswith(prefixes)}, target)
    return target


def alone(source: Path, target: Path, prefix: str, new: str = "") -> Path:
    """A copy of the tensors under a prefix, under another."""
    tensors = {n.removeprefix(prefix): t for n, t in load_file(source).items() if n.startswith(prefix)}
    save_file({new + n: t for n, t in tensors.items()}, target)
    return target


UNET, VAE, G = "model.diffusion_model.", "first_stage_model.", "conditioner.embedders.1.model."


@pytest.mark.parametrize(
    ("kind", "prefixes", "said"),
    [
        ("sd1", (VAE,), "holds unet and text_encoder of Stable Diffusion 1 but no vae; give what is missing with vae="),
        (
            "sdxl",
            (VAE, "conditioner.embedders.0."),
            "no text_encoder and no vae; give what is missing with text_encoder= and vae=",
        ),
        ("sdxl", ("conditioner.embedders.1.",), "no text_encoder_2; give what is missing with text_encoder="),
        ("refiner", (VAE,), "holds unet and text_encoder_2 of Stable Diffusion XL but no vae"),
        ("sd3", ("text_encoders.",), "no text_encoder and no text_encoder_2; give what is missing with text_encoder="),
    ],
)
def test_what_is_missing_is_named(root: Path, tmp_path: Path, kind: str, prefixes: tuple[str, ...], said: str) -> None:
    path = cut(file_of(root, kind), tmp_path / "cut.safetensors", *prefixes)
    with pytest.raises(CheckpointError) as caught:
        load_parts(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_t5_may_be_missing(root: Path, tmp_path: Path) -> None:
    parts = load_parts(cut(file_of(root, "sd3"), tmp_path / "a.safetensors", "text_encoders.t5xxl."))
    assert [tower.name for tower in parts.towers] == ["text_encoder", "text_encoder_2"]
    assert ("text encoders", "no T5; the prompt has zeros in its place") in parts.identity.evidence


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "refiner", "sd3"])
@pytest.mark.parametrize("source", ["file", "folder"])
def test_parts_from_elsewhere(root: Path, tmp_path: Path, kind: str, source: str) -> None:
    """What was cut out is given back, from the whole file or folder."""
    whole = file_of(root, kind) if source == "file" else folder_of(root, kind)
    texts = {"sdxl": "conditioner.embedders.0.", "sd3": "text_encoders."}.get(kind, VAE)
    rest = cut(file_of(root, kind), tmp_path / "cut.safetensors", VAE, texts)
    parts = load_parts(rest, vae=whole, text_encoder=whole)
    assert_same(weights(parts), weights(loaded(file_of(root, kind))))
    claims = dict(parts.identity.evidence)
    assert claims["vae"] == f"from {whole}, as asked for"
    assert set(parts.identity.files["vae"]) <= {whole, *whole.glob("vae/*")}


@pytest.mark.parametrize("names", ["prefixed", "bare", "vae.", "diffusers"])
def test_a_vae_file_of_any_layout(root: Path, tmp_path: Path, names: str) -> None:
    folder, path = folder_of(root, "sdxl"), tmp_path / "vae.safetensors"
    if names == "diffusers":
        save_file(tiny.read(folder / "vae"), path)
    else:
        prefix = {"prefixed": VAE, "bare": ""}.get(names, names)
        save_file(tiny.ldm_vae_tensors(folder / "vae", prefix), path)
    parts = load_parts(file_of(root, "sdxl-inpaint"), vae=path)
    assert_same(parts.vae.state_dict(), tiny.read(folder / "vae"))
    assert parts.vae.config.scaling_factor == 0.13025
    with pytest.raises(CheckpointError, match="it is a VAE alone; open a checkpoint and give this as vae="):
        load_parts(path)


def test_a_vae_folder_keeps_its_own_scale(root: Path) -> None:
    parts = load_parts(file_of(root, "sd1"), vae=folder_of(root, "sdxl") / "vae")
    assert parts.vae.config.scaling_factor == 0.13025
    assert loaded(file_of(root, "sd1")).vae.config.scaling_factor == 0.18215


def test_a_vae_whose_attention_has_its_old_names(root: Path, tmp_path: Path) -> None:
    """As stable-diffusion-v1-5's folder still has them."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = {}
    for name, t in tiny.read(folder_of(root, "sd1") / "vae").items():
        new = name
        for a, b in old.items():
            new = new.replace(a, b)
        tensors[new] = t
    assert sum("proj_attn" in name for name in tensors) == 4
    save_file(tensors, tmp_path / "vae.safetensors")
    parts = load_parts(folder_of(root, "sd1"), vae=tmp_path / "vae.safetensors")
    assert_same(parts.vae.state_dict(), tiny.read(folder_of(root, "sd1") / "vae"))


@pytest.mark.parametrize("names", ["bare", "transformers", "comfy"])
def test_text_encoder_files(root: Path, tmp_path: Path, names: str) -> None:
    """Both of SDXL's, each a file of its own: the narrower one is the first."""
    file, folder = file_of(root, "sdxl"), folder_of(root, "sdxl")
    first, second = tmp_path / "l.safetensors", tmp_path / "g.safetensors"
    if names == "transformers":
        save_file(tiny.read(folder / "text_encoder"), first)
        save_file(tiny.read(folder / "text_encoder_2"), second)
    else:
        start = "clip_l.transformer." if names == "comfy" else ""
        alone(file, first, "conditioner.embedders.0.transformer.", start)
        alone(file, second, "conditioner.embedders.1.model.")
    rest = tmp_path / "rest.safetensors"
    without = {n: t for n, t in load_file(file).items() if not n.startswith("conditioner.")}
    save_file(without | {f"{G}logit_scale": torch.ones(())}, rest)  # all that is left of a text encoder
    parts = load_parts(rest, text_encoder=[second, first])
    assert_same(weights(parts), weights(load_parts(file)))
    with pytest.raises(CheckpointError, match="it is a text encoder without U-Net"):
        load_parts(first)


def test_a_text_encoder_in_the_place_of_one_that_is_there(root: Path) -> None:
    """The one that is as wide."""
    parts = load_parts(file_of(root, "sdxl"), text_encoder=folder_of(root, "refiner"))
    assert_same(parts.modules()["text_encoder_2"].state_dict(), weights_of(root, "refiner", "text_encoder_2"))
    assert_same(parts.modules()["text_encoder"].state_dict(), weights_of(root, "sdxl", "text_encoder"))


def weights_of(root: Path, kind: str, part: str) -> dict[str, Tensor]:
    return tidied_clip(tiny.read(folder_of(root, kind) / part))


@pytest.mark.parametrize("names", ["bare", "prefixed", "diffusers", "folder", "whole file", "whole folder"])
def test_a_unet_from_elsewhere(root: Path, tmp_path: Path, names: str) -> None:
    file, folder = file_of(root, "sdxl-inpaint"), folder_of(root, "sdxl-inpaint")
    source = tmp_path / "unet.safetensors"
    if names in {"bare", "prefixed"}:
        alone(file, source, UNET, "" if names == "bare" else UNET)
    elif names == "diffusers":
        save_file(tiny.read(folder / "unet"), source)
    else:
        source = {"folder": folder / "unet", "whole file": file, "whole folder": folder}[names]
    parts = load_parts(folder_of(root, "sdxl"), unet=source)
    assert_same(parts.unet.state_dict(), tiny.read(folder / "unet"))
    assert parts.identity.variant == "inpaint"
    assert_same(parts.vae.state_dict(), tiny.read(folder_of(root, "sdxl") / "vae"))


def test_a_transformer_alone(root: Path, tmp_path: Path) -> None:
    bare = alone(file_of(root, "sd3"), tmp_path / "a.safetensors", UNET)
    whole = folder_of(root, "sd3")
    parts = load_parts(bare, vae=whole, text_encoder=whole)
    assert_same(weights(parts), weights(load_parts(whole)))
    assert parts.identity.layout == "transformer alone"
    assert_same(weights(load_parts(whole, unet=bare)), weights(load_parts(whole)))


def test_a_unet_of_known_width_alone(tmp_path: Path) -> None:
    """With a prompt 768 wide it can only be Stable Diffusion 1; the rest comes from elsewhere."""
    torch.manual_seed(0)
    for width, title in ((768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2")):
        unet = tiny.unet(cross_attention_dim=width).state_dict()
        for naming in ("diffusers", "original"):
            path = tmp_path / f"{naming}-{width}.safetensors"
            save_file(
                unet if naming == "diffusers" else {tiny.ldm_unet_name(n, unet): t for n, t in unet.items()}, path
            )
            with pytest.raises(CheckpointError, match=f"holds unet of {title} but no text_encoder and no vae"):
                load_parts(path)


# The averaged copy


def test_the_averaged_copy(root: Path, tmp_path: Path) -> None:
    file = load_file(file_of(root, "sd1"))
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): t + 1
        for name, t in file.items() if name.startswith(UNET)
    }  # fmt: skip
    assert "model_ema.diffusion_modelinput_blocks00weight" in averaged
    save_file(file | averaged | {"model_ema.decay": torch.ones(())}, tmp_path / "a.safetensors")
    plain, ema = load_parts(tmp_path / "a.safetensors"), load_parts(tmp_path / "a.safetensors", ema=True)
    assert_same(ema.unet.state_dict(), {n: t + 1 for n, t in plain.unet.state_dict().items()})
    assert_same(ema.vae.state_dict(), plain.vae.state_dict())
    assert ("averaged copy", "asked for: model_ema.*") in ema.identity.evidence
    missing = {n: t for n, t in averaged.items() if "out2" not in n}
    save_file(file | missing, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"no averaged copy \(model_ema\.\*\) of 2 tensors of the U-Net"):
        load_parts(tmp_path / "b.safetensors", ema=True)
    assert_same(weights(load_parts(tmp_path / "b.safetensors")), weights(plain))


def test_no_averaged_copy(root: Path) -> None:
    with pytest.raises(CheckpointError, match=r"looks like Stable Diffusion 1, but it has no averaged copy"):
        load_parts(file_of(root, "sd1"), ema=True)
    with pytest.raises(CheckpointError, match="holds one copy of its weights; load it without ema"):
        load_parts(folder_of(root, "sd1"), ema=True)
    with pytest.raises(CheckpointError, match="such files hold no averaged copy"):
        load_parts(file_of(root, "sd3"), ema=True)


# Layouts that differ a little


def test_text_encoders_where_comfy_has_them(root: Path, tmp_path: Path) -> None:
    tensors = tiny.ldm_tensors(
        folder_of(root, "sdxl"), texts={k: v for k, v in tiny.COMFY_TEXTS.items() if "3" not in k}
    )
    save_file({n.replace(VAE, "vae."): t.contiguous() for n, t in tensors.items()}, tmp_path / "a.safetensors")
    assert_same(weights(load_parts(tmp_path / "a.safetensors")), weights(loaded(file_of(root, "sdxl"))))
    tensors = tiny.ldm_tensors(folder_of(root, "sd1"), texts={"text_encoder": tiny.COMFY_TEXTS["text_encoder"]})
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "b.safetensors")
    assert_same(weights(load_parts(tmp_path / "b.safetensors")), weights(loaded(file_of(root, "sd1"))))


def test_what_stands_beside_the_networks_is_left_out_and_said(root: Path, tmp_path: Path) -> None:
    extra = {"depth_model.pretrained.cls_token": torch.ones(3), "model_ema.num_updates": torch.tensor(3),
             "logvar": torch.ones(9), "cond_stage_model.model.attn_mask": torch.ones(7, 7)}  # fmt: skip
    save_file(load_file(file_of(root, "sd2-depth")) | extra, tmp_path / "a.safetensors")
    parts = load_parts(tmp_path / "a.safetensors")
    assert_same(weights(parts), weights(loaded(file_of(root, "sd2-depth"))))
    assert ("left out", "a depth estimator") in parts.identity.evidence


def test_a_file_of_open_clip_with_23_layers(root: Path, tmp_path: Path) -> None:
    """As diffusers' own script writes it: nothing more is left out."""
    path = cut(file_of(root, "sd2"), tmp_path / "a.safetensors", "cond_stage_model.model.transformer.resblocks.23.")
    assert_same(weights(load_parts(path)), weights(loaded(file_of(root, "sd2"))))


def test_a_folder_of_torch_files(root: Path, tmp_path: Path) -> None:
    """`.bin`, as folders were before safetensors; with safetensors beside them, these are read."""
    import shutil

    path = Path(shutil.copytree(folder_of(root, "sd1"), tmp_path / "model"))
    for file in path.glob("*/*.safetensors"):
        name = "pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
    want = weights(loaded(folder_of(root, "sd1")))
    assert_same(weights(load_parts(path)), want)
    for file in path.glob("*/*.safetensors"):
        file.unlink()
    parts = load_parts(path)
    assert_same(weights(parts), want)
    assert [p.name for p in parts.identity.files["text_encoder"]] == ["pytorch_model.bin"]


# What is refused


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["double_blocks.0.img_attn.qkv.weight"], "it looks like Flux"),
        (["lora_unet_down_blocks_0.lora_up.weight"], "a LoRA, not a checkpoint"),
        (["control_model.input_hint_block.0.weight"], "a ControlNet, not a checkpoint"),
        (["input_blocks.0.0.weight", "input_hint_block.0.weight"], "a ControlNet, not a checkpoint"),
        (["conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight",
          "controlnet_cond_embedding.conv_in.weight"], "a ControlNet, not a checkpoint"),
        (["down_blocks.0.resnets.0.conv1.weight"], "one part of a diffusers folder"),
        (["conditioner.embedders.0.model.ln"], "the Stable Diffusion XL refiner"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a U-Net whose prompt is 0 wide, without a text encoder"),
        (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x",
          "model.diffusion_model.label_emb.0.0.weight"], "and label_emb.0.0.weight, beside cond_stage_model.*"),
        (["model.diffusion_model.joint_blocks.0.x"], "looks like Stable Diffusion 3, but tensor x_embedder.proj"),
        (["a", "b", "c", "d"], "4 tensors, the first are a, b, c"),
    ],
)  # fmt: skip
def test_other_files_are_named(tmp_path: Path, names: list[str], said: str) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_parts(tmp_path / "a.safetensors")
    assert said in str(caught.value)
    assert str(tmp_path / "a.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("sdxl", {f"{UNET}stray": (1,)}, "the U-Net in .* does not fit: 1 tensors that such a U-Net has not: stray"),
        ("sdxl", {"stray": (1,)}, "it has 1 tensors that Stable Diffusion XL has not: stray"),
        ("sdxl", {f"{UNET}out.2.weight": (4,)}, r"tensor out\.2\.weight has shape \[4\]; expected 4 dimensions"),
        ("sdxl", {f"{UNET}out.2.weight": (4, 32, 3, 0)}, "is empty"),
        ("sdxl", {f"{UNET}label_emb.0.0.weight": (128, 73)}, r"73: 24 of the pooled prompt leave no even share"),
        ("sdxl", {f"{UNET}input_blocks.0.0.weight": (32, 6, 3, 3)}, "takes 6 channels for latents of 4"),
        ("sdxl", {f"{VAE}decoder.conv_in.weight": (64, 5, 3, 3)}, "draws 4 channels of latents, the VAE has 5"),
        ("sdxl", {f"{G}transformer.resblocks.0.attn.in_proj_bias": (193,)}, "no 3 equal parts"),
        ("sdxl", {f"{G}text_projection": (7,)}, "text_projection"),
        ("sdxl", {f"{G}positional_embedding": (77, 96)}, "wrongly shaped"),
        ("sd2", {"cond_stage_model.model.token_embedding.weight": (49408, 33)}, "33 wide but the denoising network"),
        ("sd1", {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (40, 32)},
         "the tokenizer has 49408 ids, the text encoder only 40"),
        ("playground", {"edm_mean": (3,)}, "expected 4 numbers above zero"),
        ("sd3-without-t5", {"stray": (1,)}, "tensor stray is of no part"),
        ("sd3-without-t5", {f"{UNET}context_embedder.weight": (128, 90)}, "96 wide but .* expects 90"),
        ("sd3-without-t5", {f"{UNET}x_embedder.proj.weight": (128, 4, 2, 2)}, "4 channels of latents, the VAE has 16"),
    ],
)  # fmt: skip
def test_hostile_headers_are_refused(
    root: Path, tmp_path: Path, kind: str, change: dict[str, tuple[int, ...]], said: str
) -> None:
    tensors = load_file(file_of(root, kind)) | {name: torch.zeros(shape) for name, shape in change.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=said) as caught:
        load_parts(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_a_unet_of_another_family_is_refused(root: Path) -> None:
    with pytest.raises(CheckpointError, match="is no unet of Stable Diffusion 1: Stable Diffusion XL"):
        load_parts(folder_of(root, "sd1"), unet=file_of(root, "sdxl"))
    with pytest.raises(CheckpointError, match="is Stable Diffusion XL; its unet is none of Stable Diffusion 1"):
        load_parts(folder_of(root, "sd1"), unet=folder_of(root, "sdxl"))
    with pytest.raises(CheckpointError, match="is no transformer of Stable Diffusion 3"):
        load_parts(folder_of(root, "sd3"), unet=file_of(root, "sd1"))


def test_nothing_of_the_kind_is_refused(root: Path, tmp_path: Path) -> None:
    vae = tmp_path / "vae.safetensors"
    save_file(tiny.read(folder_of(root, "sd1") / "vae"), vae)
    with pytest.raises(CheckpointError, match="holds no text encoder"):
        load_parts(folder_of(root, "sd1"), text_encoder=vae)
    text = tmp_path / "text.safetensors"
    save_file(tiny.read(folder_of(root, "sd1") / "text_encoder"), text)
    with pytest.raises(CheckpointError, match="holds no VAE"):
        load_parts(folder_of(root, "sd1"), vae=text)
    with pytest.raises(CheckpointError, match="a T5 for which Stable Diffusion 1 has no place"):
        load_parts(folder_of(root, "sd1"), text_encoder=alone(file_of(root, "sd3"), text, "text_encoders.t5xxl."))
    with pytest.raises(CheckpointError, match="holds a T5, which Stable Diffusion 1 has not"):
        load_parts(folder_of(root, "sd1"), text_encoder=folder_of(root, "sd3") / "text_encoder_3")


def test_an_index_that_names_another_family(root: Path, tmp_path: Path) -> None:
    import json
    import shutil

    path = Path(shutil.copytree(folder_of(root, "sd1"), tmp_path / "model"))
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(
        CheckpointError, match="is Stable Diffusion XL, but the networks are those of Stable Diffusion 1"
    ):
        load_parts(path)
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": "MyPipeline"}))
    assert load_parts(path).identity.family == "sd1"
    (path / "model_index.json").write_text(json.dumps({"_class_name": "MyPipeline", "unet": 3}))
    with pytest.raises(CheckpointError, match="no family that this version opens: a MyPipeline of no networks"):
        load_parts(path)


def test_two_that_claim_one_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["sd2"]
    twin = replace(family, claims_file=lambda sight: "everything")
    monkeypatch.setattr("reverie.families.detect.load_all", lambda: [FAMILIES["sd1"], twin])
    with pytest.raises(CheckpointError, match=r"could be of several families: sd1 \(.*\); sd2 \(everything\)"):
        load_parts(file_of(root, "sd1"))
