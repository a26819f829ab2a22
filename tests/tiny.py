"""Stable Diffusion models with random weights, made by diffusers and transformers, in both published layouts.

Nothing here calls Reverie's own renaming tables or readers: the tests would prove nothing otherwise.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.vocabulary import tokenizer_folder

# The oracles. Their classes are built by untyped decorators, so that their types would only be in the way.
diffusers: Any = import_module("diffusers")
transformers: Any = import_module("transformers")

SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
TOKENS = 49408  # 2 * 256 symbols of bytes, 48894 merges, start and end of text


def scheduler_of(config: Mapping[str, Any]) -> Any:
    """A scheduler of diffusers from `_class_name` and its settings."""
    settings = dict(config)
    return getattr(diffusers, settings.pop("_class_name"))(**settings)


def unet(**settings: Any) -> Any:
    """A U-Net of two levels, the upper one with attention."""
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 2,
            "cross_attention_dim": 64,
            "attention_head_dim": 8,
            **settings,
        }
    ).eval()


def vae(**settings: Any) -> Any:
    """An autoencoder of three levels: four pixels a latent."""
    widths = settings.get("block_out_channels", (32, 32, 64))
    return diffusers.AutoencoderKL(
        **{
            "block_out_channels": widths,
            "down_block_types": ("DownEncoderBlock2D",) * len(widths),
            "up_block_types": ("UpDecoderBlock2D",) * len(widths),
            "layers_per_block": 1,
            "scaling_factor": 0.18215,
            **settings,
        }
    ).eval()


def text_encoder(**settings: Any) -> Any:
    """A CLIP text encoder of three layers with the published vocabulary."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 1}
    ends = {"bos_token_id": TOKENS - 2, "eos_token_id": TOKENS - 1, "pad_token_id": TOKENS - 1}
    config = transformers.CLIPTextConfig(**{"vocab_size": TOKENS, **shape, **ends, **settings})
    return transformers.CLIPTextModel(config).eval()


def assembled(folder: Path, scheduler: Any, networks: tuple[Any, Any, Any], merges_kept: int | None = None) -> Any:
    """A pipeline of text encoder, U-Net and VAE; the tokenizer is written into `folder / "clip"`."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer_folder(folder / "clip", merges_kept))
    pipe = diffusers.StableDiffusionPipeline(
        text_encoder=networks[0], unet=networks[1], vae=networks[2], tokenizer=tokenizer, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(folder: Path, scheduler: Any, *, seed: int = 0, merges_kept: int | None = None) -> Any:
    """A pipeline small enough to draw in a fraction of a second; widths are multiples of 32 as in the LDM layout.

    Args:
        merges_kept: fewer merges open faster; the single-file layout needs all of them.
    """
    torch.manual_seed(seed)
    return assembled(folder, scheduler, (text_encoder(), unet(), vae()), merges_kept)


# The original layout (CompVis latent-diffusion: openaimodel.py, model.py), which numbers its blocks as they run.
UNET_PLAIN = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "class_embedding.linear_1.": "label_emb.0.0.",
    "class_embedding.linear_2.": "label_emb.0.2.",
    "class_embedding.": "label_emb.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
UNET_INSIDE = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


@cache
def _unet_blocks(names: frozenset[str]) -> dict[str, str]:
    """The path of every module that runs in turn, in the original layout: one number for each step down or up."""
    return _numbered(names, "down", "input_blocks", 1) | _numbered(names, "up", "output_blocks", 0)


def _numbered(names: frozenset[str], side: str, theirs: str, number: int) -> dict[str, str]:
    def there(path: str) -> bool:
        return any(name.startswith(path) for name in names)

    found, level = {}, 0
    while there(block := f"{side}_blocks.{level}."):
        j = 0
        while there(resnet := f"{block}resnets.{j}."):
            found[resnet] = f"{theirs}.{number}.0."
            found[f"{block}attentions.{j}."] = f"{theirs}.{number}.1."
            # that of the last residual block stays
            found[f"{block}upsamplers.0."] = f"{theirs}.{number}.{2 if there(f'{block}attentions.{j}.') else 1}."
            number, j = number + 1, j + 1
        if there(f"{block}downsamplers."):
            found[f"{block}downsamplers.0.conv."] = f"{theirs}.{number}.0.op."
            number += 1
        level += 1
    return found


def ldm_unet_name(name: str, names: Mapping[str, Any]) -> str:
    """One tensor's name in the original layout, without the prefix.

    Args:
        names: all names of the U-Net: where a block stands depends on those before it.
    """
    table = _unet_blocks(frozenset(names)) | UNET_PLAIN
    start = max((start for start in table if name.startswith(start)), key=len)
    rest = name.removeprefix(start)
    return table[start] + (_inside(rest) if ".resnets." in start else rest)


def _inside(rest: str) -> str:
    module, _, leaf = rest.partition(".")
    return f"{UNET_INSIDE[module]}.{leaf}"


def ldm_vae_name(name: str, levels: int) -> str:
    """One tensor's name in the original layout, without the prefix; the decoder counts its levels backwards."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        for ours, theirs in VAE_ATTENTION.items():
            name = re.sub(rf"mid_block\.attentions\.0\.{re.escape(ours)}\.", f"mid.attn_1.{theirs}.", name)
    name = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
    name = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", name)
    return re.sub(r"(down|up)samplers\.0\.conv", r"\1sample.conv", name).replace(".resnets.", ".block.")


# Where the text encoders of each family are in a single file, and whether under OpenCLIP's names.
Texts = Mapping[str, tuple[str, bool]]
SD1_TEXTS: Texts = {"text_encoder": ("cond_stage_model.transformer.", False)}
SD2_TEXTS: Texts = {"text_encoder": ("cond_stage_model.model.", True)}
SDXL_TEXTS: Texts = {
    "text_encoder": ("conditioner.embedders.0.transformer.", False),
    "text_encoder_2": ("conditioner.embedders.1.model.", True),
}
REFINER_TEXTS: Texts = {"text_encoder_2": ("conditioner.embedders.0.model.", True)}
COMFY_TEXTS: Texts = {
    "text_encoder": ("text_encoders.clip_l.transformer.", False),
    "text_encoder_2": ("text_encoders.clip_g.transformer.", False),
    "text_encoder_3": ("text_encoders.t5xxl.transformer.", False),
}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip


def open_clip_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder of transformers under OpenCLIP's names (its `transformer.py`, torch's MultiheadAttention)."""
    bare = {name.removeprefix("text_model."): t for name, t in tensors.items()}
    found = {
        "token_embedding.weight": bare.pop("embeddings.token_embedding.weight"),
        "positional_embedding": bare.pop("embeddings.position_embedding.weight"),
        "ln_final.weight": bare.pop("final_layer_norm.weight"),
        "ln_final.bias": bare.pop("final_layer_norm.bias"),
    }
    if "text_projection.weight" in bare:
        found["text_projection"] = bare.pop("text_projection.weight").T.contiguous()
    return found | _open_clip_layers(bare)


def open_clip_vision(tensors: Mapping[str, Tensor], prefix: str = "visual.") -> dict[str, Tensor]:
    """An image encoder of transformers under OpenCLIP's names (its `transformer.py: VisionTransformer`)."""
    bare = {name.removeprefix("vision_model."): t for name, t in tensors.items() if "position_ids" not in name}
    found = {
        "class_embedding": bare.pop("embeddings.class_embedding"),
        "positional_embedding": bare.pop("embeddings.position_embedding.weight"),
        "conv1.weight": bare.pop("embeddings.patch_embedding.weight"),
        "proj": bare.pop("visual_projection.weight").T,
    }
    for ours, theirs in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        found |= {f"{theirs}.{leaf}": bare.pop(f"{ours}.{leaf}") for leaf in ("weight", "bias")}
    return {prefix + name: t.contiguous() for name, t in (found | _open_clip_layers(bare)).items()}


def _open_clip_layers(bare: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`encoder.layers.0.mlp.fc1.weight` and the like: queries, keys and values are one tensor there."""
    found = {}
    for name, t in bare.items():
        _, _, layer, *module, leaf = name.split(".")
        start, inside = f"transformer.resblocks.{layer}", ".".join(module)
        if inside in OPEN_CLIP:
            found[f"{start}.{OPEN_CLIP[inside]}.{leaf}"] = t
        elif inside == "self_attn.q_proj":
            stacked = [bare[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            found[f"{start}.attn.in_proj_{leaf}"] = torch.cat(stacked)
        else:
            assert inside in {"self_attn.k_proj", "self_attn.v_proj"}, name
    return found


def ldm_tensors(folder: Path, *, prefix: bool = True, texts: Texts = SD1_TEXTS) -> dict[str, Tensor]:
    """All tensors of a diffusers folder under their original names and shapes.

    Args:
        prefix: whether the text encoder's names have the level `text_model`, which some files lack.
        texts: where which text encoder goes.
    """
    unet_tensors = read(folder / "unet")
    found = {f"model.diffusion_model.{ldm_unet_name(n, unet_tensors)}": t for n, t in unet_tensors.items()}
    found |= ldm_vae_tensors(folder / "vae")
    for part, (start, open_clip) in texts.items():
        text = read(folder / part)
        if open_clip:
            found |= {start + name: t for name, t in open_clip_tensors(text).items()}
            continue
        for name, t in text.items():
            bare = name.removeprefix("text_model.")  # transformers 5 writes no prefix, 4 does
            level = "text_model." if prefix and not name.startswith("text_projection") else ""
            found[f"{start}{level}{bare}"] = t
    return found


def ldm_vae_tensors(folder: Path, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    """The tensors of a VAE's folder under their original names and shapes."""
    levels = len(json.loads((folder / "config.json").read_text())["block_out_channels"])
    found = {}
    for name, t in read(folder).items():
        convolution = ".attentions." in name and name.endswith("weight") and t.ndim == 2
        shaped = t[:, :, None, None] if convolution else t
        found[f"{prefix}{ldm_vae_name(name, levels)}"] = shaped.contiguous()
    return found


def single_file(
    folder: Path, path: Path, *, prefix: bool = True, dtype: torch.dtype | None = None, texts: Texts = SD1_TEXTS
) -> Path:
    """Write a diffusers folder as one file in the original layout, with what training leaves in such files."""
    found = ldm_tensors(folder, prefix=prefix, texts=texts)
    tensors = {name: t.to(dtype or t.dtype) for name, t in found.items()}
    tensors["alphas_cumprod"] = torch.ones(1000)
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    if prefix and texts is SD1_TEXTS:
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path)
    return path


def read(part: Path) -> dict[str, Tensor]:
    """The tensors of one part of a folder."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(part.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


# Every family and variant, small. Where heads are counted by width there is one for each 64 channels.

NARROW = {"hidden_size": 32, "intermediate_size": 48}  # the table of the published words is most of a tiny model


@dataclass(frozen=True)
class Recipe:
    """A model to make; settings are those of the classes of diffusers and transformers.

    Attributes:
        texts: of each text encoder, by its folder; with `projection_dim` it is one with projection.
        places: where the text encoders are in a single file.
        extra: tensors that a single file holds beside the networks.
        index: what `model_index.json` says beside the networks.
    """

    pipeline: str = "StableDiffusionPipeline"
    unet: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"text_encoder": NARROW})
    scheduler: Mapping[str, Any] = field(
        default_factory=lambda: {"_class_name": "PNDMScheduler", "skip_prk_steps": True} | SCHEDULER
    )
    vae: Mapping[str, Any] = field(default_factory=dict)
    places: Texts = field(default_factory=lambda: SD1_TEXTS)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)


DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def levels(attended: tuple[int, ...]) -> dict[str, Any]:
    """The blocks of a U-Net of which these levels have attention."""
    return {"down_block_types": tuple(DOWN[a] for a in attended),
            "up_block_types": tuple(UP[a] for a in attended[::-1])}  # fmt: skip


DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False} | SCHEDULER
V = DDIM | {"prediction_type": "v_prediction"}
EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"} | SCHEDULER
LINEAR = {
    "block_out_channels": (32, 64), "attention_head_dim": 1, "use_linear_projection": True,
    "cross_attention_dim": 32,
}  # fmt: skip
LEGACY = NARROW | {
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}  # published configs say so, whatever is true
H = LEGACY | {"hidden_act": "gelu"}
H23 = H | {"num_hidden_layers": 23}  # as many as are used of 24
G = LEGACY | {"hidden_act": "gelu", "hidden_size": 64, "projection_dim": 24}
XL_TEXTS: dict[str, Mapping[str, Any]] = {"text_encoder": LEGACY, "text_encoder_2": G}
TEXT_TIME = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
XL = LINEAR | TEXT_TIME | {
    "cross_attention_dim": 32 + 64, "projection_class_embeddings_input_dim": 24 + 6 * 8,
    "transformer_layers_per_block": [1, 3], **levels((0, 1)),
}  # fmt: skip
XL3 = XL | {"block_out_channels": (32, 64, 128), "attention_head_dim": (1, 1, 2)} | levels((0, 1, 1))
EDM = {
    "_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon", "sigma_data": 0.5,
    "sigma_max": 80.0, "sigma_min": 0.002, "rho": 7.0, "num_train_timesteps": 1000,
}  # fmt: skip
STATISTICS = {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]}
PLAYGROUND_MARKS = {f"edm_{n}": torch.tensor(STATISTICS[f"latents_{n}"])[None, :, None, None] for n in ("mean", "std")}

LAST_OF_24 = {
    f"cond_stage_model.model.transformer.resblocks.23.{name}": torch.full((2,), 0.5) for name in ("ln_1.weight", "x")
} | {"cond_stage_model.model.text_projection": torch.ones(2, 2)}


def _sd1(**settings: Any) -> Recipe:
    return Recipe(unet={"cross_attention_dim": 32} | settings)


def _sd2(pipeline: str, scheduler: Mapping[str, Any], **settings: Any) -> Recipe:
    start = "cond_stage_model.model."
    extra = {f"{start}text_projection": torch.ones(2, 2), f"{start}logit_scale": torch.ones(())}
    return Recipe(pipeline, LINEAR | settings, {"text_encoder": H}, scheduler, places=SD2_TEXTS, extra=extra)


def _xl(unet_settings: Mapping[str, Any], **settings: Any) -> Recipe:
    named: dict[str, Any] = {
        "pipeline": "StableDiffusionXLPipeline", "texts": XL_TEXTS, "scheduler": EULER, "places": SDXL_TEXTS,
        "vae": {"scaling_factor": 0.13025}, "index": {"force_zeros_for_empty_prompt": True},
    }  # fmt: skip
    return Recipe(unet=unet_settings, **(named | settings))


RECIPES: dict[str, Recipe] = {
    "sd1": _sd1(),
    "sd1-inpaint": replace(_sd1(in_channels=9), pipeline="StableDiffusionInpaintPipeline"),
    "sd1-pix2pix": replace(_sd1(in_channels=8), pipeline="StableDiffusionInstructPix2PixPipeline"),
    "lcm": replace(
        _sd1(time_cond_proj_dim=16), pipeline="LatentConsistencyModelPipeline",
        scheduler={"_class_name": "LCMScheduler"} | SCHEDULER,
    ),
    "bk-sdm-small": _sd1(layers_per_block=1, mid_block_type=None),
    "tiny-sd": _sd1(layers_per_block=1, mid_block_type=None, block_out_channels=(32, 64, 64), **levels((1, 1, 1))),
    "sd2": replace(
        _sd2("StableDiffusionPipeline", Recipe().scheduler), texts={"text_encoder": H23}, extra=LAST_OF_24
    ),
    "sd2-v": _sd2("StableDiffusionPipeline", V),
    "sd2-inpaint": _sd2("StableDiffusionInpaintPipeline", Recipe().scheduler, in_channels=9),
    "sd2-depth": _sd2("StableDiffusionDepth2ImgPipeline", Recipe().scheduler, in_channels=5),
    "unclip": _sd2(
        "StableUnCLIPImg2ImgPipeline", V, class_embed_type="projection", projection_class_embeddings_input_dim=24
    ),
    "x4-upscaler": Recipe(
        "StableDiffusionUpscalePipeline",
        {
            "in_channels": 7, "cross_attention_dim": 32, "block_out_channels": (32, 96, 64), "attention_head_dim": 8,
            "num_class_embeds": 20, "only_cross_attention": [True, True, False], "use_linear_projection": True,
            **levels((0, 1, 1)),
        },
        {"text_encoder": H}, V | {"beta_start": 0.0001, "beta_end": 0.02}, {"scaling_factor": 0.08333}, SD2_TEXTS,
    ),
    "sdxl": _xl(XL),
    "sdxl-inpaint": _xl(XL | {"in_channels": 9}, pipeline="StableDiffusionXLInpaintPipeline"),
    "sdxl-pix2pix": _xl(XL | {"in_channels": 8}, pipeline="StableDiffusionXLInstructPix2PixPipeline"),
    "refiner": _xl(
        XL | {"cross_attention_dim": 64, "projection_class_embeddings_input_dim": 24 + 5 * 8,
              "transformer_layers_per_block": 2, **levels((0, 1))},
        pipeline="StableDiffusionXLImg2ImgPipeline", texts={"text_encoder_2": G}, places=REFINER_TEXTS,
        index={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True,
               "text_encoder": [None, None], "tokenizer": [None, None]},
    ),
    "ssd-1b": _xl(
        XL3 | {"transformer_layers_per_block": [1, [2, 2], [1, 3]], "mid_block_type": "UNetMidBlock2D",
               "reverse_transformer_layers_per_block": [[1, 2, 3], [2, 1, 1], 1]}
    ),
    "koala": _xl(XL3 | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 3], "mid_block_type": None}),
    "playground": _xl(XL, scheduler=EDM, vae={"scaling_factor": 0.5, **STATISTICS}, extra=PLAYGROUND_MARKS),
}  # fmt: skip


def model(root: Path, kind: str, merges_kept: int | None = None) -> Path:
    """The diffusers folder of a recipe, made once under `root`.

    Args:
        merges_kept: fewer merges open faster, but make other ids than those of a single file.
    """
    path, recipe = root / kind, RECIPES[kind]
    if path.exists():
        return path
    torch.manual_seed(sum(map(ord, kind)))
    index: dict[str, Any] = {"_class_name": recipe.pipeline, **recipe.index}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
    unet(**recipe.unet).save_pretrained(path / "unet")
    vae(**recipe.vae).save_pretrained(path / "vae")
    scheduler_of(recipe.scheduler).save_pretrained(path / "scheduler")
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
              "scheduler": ["diffusers", recipe.scheduler["_class_name"]]}  # fmt: skip
    for part, settings in recipe.texts.items():
        pad = "!" if settings.get("hidden_act") == "gelu" else "<|endoftext|>"
        index |= _text_parts(root, path, part, settings, pad, merges_kept)
    (path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return path


def _text_parts(
    root: Path, path: Path, part: str, settings: Mapping[str, Any], pad: str, merges_kept: int | None
) -> dict[str, list[str]]:
    """One text encoder and its tokenizer, linked from where another recipe has already made the same."""
    name = "CLIPTextModelWithProjection" if "projection_dim" in settings else "CLIPTextModel"
    tokens = part.replace("text_encoder", "tokenizer")
    made = root / "shared" / f"{name}-{sorted(settings.items())}".replace("/", "")
    if not made.exists():
        network = getattr(transformers, name)(text_encoder(**settings).config)
        if settings.get("projection_dim") == network.config.hidden_size:  # CLIP-L's in Stable Diffusion 3
            torch.nn.init.eye_(network.text_projection.weight)
        network.save_pretrained(made)
    words = root / "shared" / f"tokenizer {pad[:1]} {merges_kept}"
    if not words.exists():
        tokenizer_folder(words, merges_kept, pad)
    for source, target in ((made, path / part), (words, path / tokens)):
        linked(source, target)
    return {part: ["transformers", name], tokens: ["transformers", "CLIPTokenizer"]}


def linked(source: Path, target: Path) -> None:
    """A copy of a folder whose files are links: they are not to be written over."""
    shutil.copytree(source, target, copy_function=lambda file, link: Path(link).hardlink_to(file))


def model_file(root: Path, kind: str) -> Path:
    """The single file of a recipe, in the original layout."""
    path, recipe = root / f"{kind}.safetensors", RECIPES[kind]
    if not path.exists():
        tensors = ldm_tensors(model(root, kind), texts=recipe.places) | dict(recipe.extra)
        save_file({name: t.contiguous() for name, t in tensors.items()} | {"alphas_cumprod": torch.ones(9)}, path)
    return path


# Stable Diffusion 3. The original transformer is written down in tests/families/test_sd3_names.py.

SD3_KINDS: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd3-without-t5": {},
    "sd35-large": {"qk_norm": True, "head_width": 32, "heads": 4},
    "sd35-medium": {"qk_norm": True, "dual_attention": (0, 1)},
}
SD3_SHAPE = {"layers": 3, "heads": 2, "head_width": 64, "context_width": 112, "vector_width": 32 + 24, "positions": 24}
SD3_VAE = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
           "use_post_quant_conv": False}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
L = LEGACY | {"projection_dim": 32}
T5 = {"vocab_size": 32128, "d_model": 112, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4,
      "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}  # fmt: skip


def sd3_model(root: Path, kind: str, merges_kept: int | None = None) -> Path:
    """The diffusers folder of a Stable Diffusion 3, made once under `root`; see `model`."""
    path = root / kind
    if path.exists():
        return path
    torch.manual_seed(0)
    sd3_transformer(kind).save_pretrained(path / "transformer")
    vae(**SD3_VAE).save_pretrained(path / "vae")
    scheduler_of(FLOW).save_pretrained(path / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", FLOW["_class_name"]],
        "text_encoder_3": [None, None], "tokenizer_3": [None, None],
    }  # fmt: skip
    index |= _text_parts(root, path, "text_encoder", L, "<|endoftext|>", merges_kept)
    index |= _text_parts(root, path, "text_encoder_2", G, "!", merges_kept)
    if kind != "sd3-without-t5":
        transformers.T5EncoderModel(transformers.T5Config(**T5)).save_pretrained(path / "text_encoder_3")
        _t5_tokenizer(path / "tokenizer_3")
        index |= {
            "text_encoder_3": ["transformers", "T5EncoderModel"],
            "tokenizer_3": ["transformers", "T5TokenizerFast"],
        }
    (path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return path


def sd3_original(kind: str) -> dict[str, Tensor]:
    """The transformer under its original names, without the prefix."""
    names = import_module("tests.families.test_sd3_names")
    shape = import_module("reverie.nets.mmdit").MMDiTConfig(**(SD3_SHAPE | SD3_KINDS[kind]))
    found: dict[str, Tensor] = names.original(shape)
    return {name: t * 0.05 for name, t in found.items()}  # of standard deviation 1 they would overflow


def sd3_transformer(kind: str) -> Any:
    """The same as diffusers converts it."""
    c: dict[str, Any] = SD3_SHAPE | {"qk_norm": False, "dual_attention": ()} | SD3_KINDS[kind]
    network = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=c["layers"],
        attention_head_dim=c["head_width"], num_attention_heads=c["heads"], joint_attention_dim=c["context_width"],
        caption_projection_dim=c["heads"] * c["head_width"], pooled_projection_dim=c["vector_width"],
        pos_embed_max_size=c["positions"], dual_attention_layers=c["dual_attention"],
        qk_norm="rms_norm" if c["qk_norm"] else None,
    )  # fmt: skip
    converted = import_module("tests.families.test_sd3_names").by_diffusers(sd3_original(kind))
    network.load_state_dict(converted, strict=True)
    return network.eval()


def sd3_file(root: Path, kind: str, parts: tuple[str, ...] = tuple(COMFY_TEXTS)) -> Path:
    """The single file of a Stable Diffusion 3, with some of its text encoders."""
    folder, path = sd3_model(root, kind), root / f"{kind}-{len(parts)}.safetensors"
    tensors = {f"model.diffusion_model.{name}": t for name, t in sd3_original(kind).items()}
    tensors |= ldm_vae_tensors(folder / "vae")
    for part in parts:
        if (folder / part).exists():
            for name, t in read(folder / part).items():
                level = "text_model." if part != "text_encoder_3" and name.split(".")[0] in CLIP_MODULES else ""
                tensors[f"{COMFY_TEXTS[part][0]}{level}{name}"] = t
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    return path


CLIP_MODULES = {"embeddings", "encoder", "final_layer_norm"}  # what transformers 5 writes without `text_model.`


def _t5_tokenizer(folder: Path) -> None:
    """T5's vocabulary as tokenizer.json, so that transformers reads it without sentencepiece."""
    tokenizer = import_module("reverie.text.t5_tokenizer").T5Tokenizer.published()
    folder.mkdir()
    tokenizer._model.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "T5TokenizerFast", "model_max_length": 512, "eos_token": "</s>",
                "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 100}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


# GGUF


def gguf_file(path: Path, tensors: Mapping[str, Tensor], packing: str, quantise: Any = None) -> Path:
    """Tensors as the reference library writes them: packed where it is a matrix or kernel of whole blocks.

    Args:
        quantise: `(numbers, kind) -> bytes`, where the library would take too long.
    """
    gguf: Any = import_module("gguf")
    quantise = quantise or gguf.quants.quantize
    kind = gguf.GGMLQuantizationType[packing]
    block = gguf.constants.GGML_QUANT_SIZES[kind][0]
    writer = gguf.GGUFWriter(path, "sd1")
    for name, t in tensors.items():
        numbers = t.float().numpy()
        if t.ndim < 2 or t.numel() % block:
            writer.add_tensor(name, numbers)
            continue
        if numbers.shape[-1] % block:  # city96/ComfyUI-GGUF
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(numbers.shape))
            numbers = numbers.reshape(-1, block)
        writer.add_tensor(name, quantise(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
