"""Folders of every family, written by diffusers and transformers: small, and shaped so that a header says all of it.

Heads are 64 channels wide and norms have 32 groups, as in every published model: no header says otherwise.
"""

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from reverie.engine.convert import convert
from tests import tiny
from tests.vocabulary import tokenizer_folder

diffusers: Any = import_module("diffusers")
transformers: Any = import_module("transformers")

NOISE = {**tiny.SCHEDULER, "set_alpha_to_one": False}
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, **NOISE}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def sd1(folder: Path, **scheduler: Any) -> Path:
    """Stable Diffusion 1."""
    pipe = tiny.pipeline(folder.parent, tiny.scheduler_of({**DDIM, **scheduler}))
    pipe.save_pretrained(folder)
    return folder


def sd2(folder: Path, **scheduler: Any) -> Path:
    """Stable Diffusion 2: OpenCLIP's text encoder, linear projections."""
    torch.manual_seed(0)
    unet = tiny.unet(use_linear_projection=True, attention_head_dim=[1, 1], cross_attention_dim=64)
    text = tiny.text_encoder(hidden_act="gelu", projection_dim=64)
    pipe = tiny.assembled(folder.parent, tiny.scheduler_of({**DDIM, **scheduler}), (text, unet, tiny.vae()))
    pipe.tokenizer.pad_token = "!"
    pipe.save_pretrained(folder)
    return folder


def sdxl(folder: Path, **scheduler: Any) -> Path:
    """Stable Diffusion XL: two text encoders, a vector of pooled prompt and sizes."""
    torch.manual_seed(0)
    texts = [tiny.text_encoder(), _projected("gelu")]
    unet = tiny.unet(
        use_linear_projection=True, attention_head_dim=[1, 1], cross_attention_dim=128, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=6 * 256 + 64,
        transformer_layers_per_block=[1, 2],
    )  # fmt: skip
    clip, other = (_tokenizer(folder.parent / name, pad) for name, pad in (("one", None), ("two", "!")))
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=tiny.vae(scaling_factor=0.13025), text_encoder=texts[0], text_encoder_2=texts[1], tokenizer=clip,
        tokenizer_2=other, unet=unet, scheduler=tiny.scheduler_of({**DDIM, **scheduler}), add_watermarker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def sd3(folder: Path) -> Path:
    """Stable Diffusion 3 without T5."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=64, num_attention_heads=1,
        joint_attention_dim=160, caption_projection_dim=64, pooled_projection_dim=128, out_channels=16,
        pos_embed_max_size=192, qk_norm="rms_norm", dual_attention_layers=(0,),
    ).eval()  # fmt: skip
    clip, other = (_tokenizer(folder.parent / name, pad) for name, pad in (("one", None), ("two", "!")))
    first = _projected("quick_gelu")
    first.text_projection.weight.data = torch.eye(64)
    vae = tiny.vae(
        latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=tiny.scheduler_of(FLOW), vae=vae, text_encoder=first, tokenizer=clip,
        text_encoder_2=_projected("gelu"), tokenizer_2=other, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


FOLDERS = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "sd3": sd3}


def _projected(activation: str) -> Any:
    config = tiny.text_encoder(hidden_act=activation, projection_dim=64).config
    return transformers.CLIPTextModelWithProjection(config).eval()


def _tokenizer(folder: Path, pad: str | None) -> Any:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer_folder(folder))
    if pad:
        tokenizer.pad_token = pad
    return tokenizer


@cache
def made(family: str, base: Path) -> Path:
    """The folder of a family, made once in a run. Its files are not to be changed."""
    (base / family).mkdir(parents=True)
    return FOLDERS[family](base / family / "folder")


@cache
def made_single(family: str, base: Path) -> Path:
    """The same as one file."""
    path = made(family, base).parent / "single.safetensors"
    convert(made(family, base), path)
    return path
