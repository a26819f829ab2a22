"""Tiny models with random weights, made with the project's own classes, in both layouts."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reverie.checkpoint.save import write_weights
from reverie.families import ldm as names
from reverie.families.sd1.folder import save_part, save_rest
from reverie.nets.autoencoder import Autoencoder, AutoencoderConfig
from reverie.nets.clip_text import ClipText, ClipTextConfig
from reverie.nets.unet import UNet, UNetConfig
from reverie.text.tokenizer import BOS, EOS, ClipTokenizer

SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
DEFAULTS: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0, "width": 32, "height": 32}
FACTOR = 8  # pixels a latent, with four levels
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.!"


def tokenizer(folder: Path) -> Path:
    """A vocabulary of single letters in the folder format of transformers."""
    folder.mkdir(parents=True)
    texts = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), BOS, EOS]
    (folder / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(texts)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return folder


def networks(vocab_size: int) -> tuple[ClipText, UNet, Autoencoder]:
    """Three networks that fit together. Widths are multiples of 32, as the LDM layout wants."""
    torch.manual_seed(0)
    text = ClipTextConfig(vocab_size=vocab_size, width=64, inner_width=64, layers=2, heads=1, positions=77)
    unet = UNetConfig(
        block_out_channels=(32, 64), attention=(True, False), heads=(8, 8), layers_per_block=1, context_width=64
    )
    vae = AutoencoderConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    return ClipText(text), UNet(unet), Autoencoder(vae)


def folder(path: Path, *, scheduler: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """Write a diffusers folder."""
    words = tokenizer(path.parent / f"{path.name}-tokenizer")
    text, unet, vae = networks(ClipTokenizer.from_folder(words).vocab_size)
    save_part(path / "text_encoder", "text_encoder", text.config, text.state_dict(), dtype)
    save_part(path / "unet", "unet", unet.config, unet.state_dict(), dtype)
    save_part(path / "vae", "vae", vae.config, vae.state_dict(), dtype)
    save_rest(path, words, scheduler or SCHEDULER, DEFAULTS)
    return path


def ldm_tensors() -> dict[str, Tensor]:
    """The same under the names of the LDM layout."""
    text, unet, vae = networks(ClipTokenizer.published().vocab_size)
    found = {names.TEXT + name: t for name, t in text.state_dict().items()}
    for prefix, module, table in (
        (names.UNET, unet, names.unet_table(unet.config)),
        (names.VAE, vae, names.vae_table(vae.config)),
    ):
        for name, t in module.state_dict().items():
            found[f"{prefix}{names.rename(name, table)}"] = t
    return {n: _convolution(t) if ".attn_1." in n and t.ndim == 2 else t for n, t in found.items()}


def _convolution(t: Tensor) -> Tensor:
    return t[:, :, None, None]


def single(path: Path) -> Path:
    """Write a single file."""
    write_weights(path, {name: t.half() for name, t in ldm_tensors().items()})
    return path
