"""Stable Diffusion models with random weights, made by diffusers and transformers, in both published layouts.

Nothing here calls Reverie's own renaming tables or readers: the tests would prove nothing otherwise.
"""

import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reverie.text.tokenizer import MERGES

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


def tokenizer_folder(folder: Path, merges_kept: int | None = None) -> Path:
    """The published CLIP vocabulary, or its first merges alone, in the folder format of transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    text = MERGES.read_text(encoding="utf-8")
    if merges_kept is not None:
        text = "\n".join(text.splitlines()[: merges_kept + 1]) + "\n"  # the first line is the version
    merges = [line.replace(" ", "") for line in text.splitlines() if line and not line.startswith("#version")]
    symbols = _byte_symbols()
    # The order of openai/CLIP's simple_tokenizer.py: bytes, bytes that end a word, merges, the two marks.
    tokens = [*symbols, *(s + "</w>" for s in symbols), *merges, "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    settings = {"model_max_length": 77, "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _byte_symbols() -> list[str]:
    """A printable character for each byte, printable bytes first (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


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


# The original layout (CompVis latent-diffusion: openaimodel.py, model.py). With two residual blocks a level there are
# three input blocks a level (two residual, one that shrinks) and three output blocks a level, counted as they run.
UNET_PLAIN = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
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


def ldm_unet_name(name: str, names: Mapping[str, Any]) -> str:
    """One tensor's name in the original layout (two residual blocks a level), without the prefix.

    Args:
        names: all names of the U-Net: whether an upsampler stands second or third depends on its neighbours.
    """
    if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{3 * int(match[1]) + 3}.0.op.{match[2]}"
    if match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", name):
        attention = any(other.startswith(f"up_blocks.{match[1]}.attentions.") for other in names)
        return f"output_blocks.{3 * int(match[1]) + 2}.{2 if attention else 1}.conv.{match[2]}"
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d)\.(.*)", name):
        side, level, kind, j, rest = match.groups()
        block = f"input_blocks.{3 * int(level) + 1 + int(j)}"
        if side == "up":
            block = f"output_blocks.{3 * int(level) + int(j)}"
        return f"{block}.0.{_inside(rest)}" if kind == "resnets" else f"{block}.1.{rest}"
    start = next(start for start in UNET_PLAIN if name.startswith(start))
    rest = name.removeprefix(start)
    return UNET_PLAIN[start] + (_inside(rest) if ".resnets." in start else rest)


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


def ldm_tensors(folder: Path, *, prefix: bool = True) -> dict[str, Tensor]:
    """All tensors of a diffusers folder under their original names and shapes.

    Args:
        prefix: whether the text encoder's names have the level `text_model`, which some files lack.
    """
    text, unet_tensors, vae_tensors = (_read(folder / part) for part in ("text_encoder", "unet", "vae"))
    levels = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])
    found = {f"model.diffusion_model.{ldm_unet_name(n, unet_tensors)}": t for n, t in unet_tensors.items()}
    for name, t in vae_tensors.items():
        convolution = ".attentions." in name and name.endswith("weight") and t.ndim == 2
        shaped = t[:, :, None, None] if convolution else t
        found[f"first_stage_model.{ldm_vae_name(name, levels)}"] = shaped.contiguous()
    for name, t in text.items():
        bare = name.removeprefix("text_model.")  # transformers 5 writes no prefix, 4 does
        found[f"cond_stage_model.transformer.{'text_model.' if prefix else ''}{bare}"] = t
    return found


def single_file(folder: Path, path: Path, *, prefix: bool = True, dtype: torch.dtype | None = None) -> Path:
    """Write a diffusers folder as one file in the original layout, with what training leaves in such files."""
    tensors = {name: t.to(dtype or t.dtype) for name, t in ldm_tensors(folder, prefix=prefix).items()}
    tensors["alphas_cumprod"] = torch.ones(1000)
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    if prefix:
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path)
    return path


def _read(part: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(part.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
