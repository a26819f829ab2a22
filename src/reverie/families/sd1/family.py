"""Stable Diffusion 1 as a family: recognise, load."""

from pathlib import Path
from typing import Any

from reverie.checkpoint.source import WeightFile, open_weights
from reverie.errors import CheckpointError
from reverie.families.base import Defaults, Identity, Parts, own_defaults
from reverie.families.scheduler import SD1_SCHEDULER, read_scheduler
from reverie.families.sd1 import folder as layout
from reverie.families.sd1 import names, single
from reverie.nets.autoencoder import Autoencoder
from reverie.nets.clip_text import ClipText
from reverie.nets.unet import UNet
from reverie.text.tokenizer import ClipTokenizer

NAME = "sd1"
TITLE = "Stable Diffusion 1"
SIZE = 64  # latents; `sample_size` of the published U-Net, 512 pixels


def load_file(path: Path) -> Parts:
    """A single file in the LDM layout.

    Raises:
        CheckpointError: not of this family, or broken.
    """
    file = open_weights(path)
    networks = single.load_networks(file)
    evidence = [
        ("family sd1", f"{names.UNET}input_blocks.* and {names.TEXT}* (CLIP from transformers)"),
        ("layout single file (LDM)", f"{len(file.tensors)} tensors, no config needed"),
    ]
    prediction, why = _prediction(file)
    evidence.append((f"prediction {prediction}", why))
    scheduler = SD1_SCHEDULER | {"prediction_type": prediction}
    tokenizer = ClipTokenizer.published()
    files: dict[str, tuple[Path, ...]] = dict.fromkeys(layout.PARTS, (path,))
    return _parts(networks, tokenizer, scheduler, {}, SIZE, ("single file (LDM)", tuple(evidence), files))


def load_folder(path: Path, variant: str | None = None) -> Parts:
    """A diffusers folder.

    Raises:
        CheckpointError: not of this family, or broken.
    """
    index = layout.read_json(path / "model_index.json")
    kind = index.get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise CheckpointError(f"{path} holds a {kind}; this version opens StableDiffusionPipeline (Stable Diffusion 1)")
    opened = {part: layout.weight_files(path / part, part, variant) for part in layout.PARTS}
    networks = (
        layout.load_part(path / "text_encoder", "text_encoder", opened["text_encoder"]),
        layout.load_part(path / "unet", "unet", opened["unet"]),
        layout.load_part(path / "vae", "vae", opened["vae"]),
    )
    scheduler = layout.read_json(path / "scheduler" / "scheduler_config.json")
    own = layout.read_json(path / "reverie.json") if (path / "reverie.json").exists() else {}
    prediction = str(scheduler.get("prediction_type", "epsilon"))
    evidence = (
        ("family sd1", f"model_index.json: {kind}; context {networks[1].config.context_width} wide"),
        ("layout diffusers folder", "model_index.json"),
        (f"prediction {prediction}", "scheduler/scheduler_config.json: prediction_type"),
    )
    files = {part: tuple(file.path for file in of_part) for part, of_part in opened.items()}
    tokenizer = ClipTokenizer.from_folder(path / "tokenizer", max_length=networks[0].config.positions)
    size = int(layout.read_json(path / "unet" / "config.json").get("sample_size") or SIZE)
    return _parts(networks, tokenizer, scheduler, own, size, ("diffusers folder", evidence, files))


def _parts(
    networks: tuple[ClipText, UNet, Autoencoder],
    tokenizer: ClipTokenizer,
    scheduler: dict[str, Any],
    own: dict[str, Any],
    size: int,
    found: tuple[str, tuple[tuple[str, str], ...], dict[str, tuple[Path, ...]]],
) -> Parts:
    text_encoder, unet, vae = networks
    _check_fit(text_encoder, unet, vae, tokenizer)
    schedule = read_scheduler(scheduler)
    pixels = size * vae.config.factor
    defaults = Defaults(
        sampler=schedule.sampler, spacing=schedule.spacing, rules=schedule.rules, width=pixels, height=pixels
    )
    return Parts(
        identity=Identity(NAME, found[0], schedule.parameterisation.name, found[1], found[2]),
        tokenizer=tokenizer, text_encoder=text_encoder, unet=unet, vae=vae,
        process=schedule.process, parameterisation=schedule.parameterisation,
        defaults=own_defaults(defaults, own.get("defaults", {})),
    )  # fmt: skip


def _check_fit(text_encoder: ClipText, unet: UNet, vae: Autoencoder, tokenizer: ClipTokenizer) -> None:
    if text_encoder.config.width != unet.config.context_width:
        raise CheckpointError(
            f"the text encoder is {text_encoder.config.width} wide but the U-Net expects {unet.config.context_width}"
        )
    if unet.config.in_channels != vae.config.latent_channels:
        raise CheckpointError(
            f"the U-Net takes {unet.config.in_channels} channels, the VAE has {vae.config.latent_channels}; "
            "inpainting and other variants are not supported yet"
        )
    if tokenizer.vocab_size > text_encoder.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the text encoder only {text_encoder.config.vocab_size}"
        )


def _prediction(file: WeightFile) -> tuple[str, str]:
    """Prediction type and the evidence for it."""
    declared = file.metadata.get("modelspec.prediction_type", "")
    if declared in {"v", "v_prediction"}:
        return "v_prediction", f"metadata modelspec.prediction_type = {declared!r}"
    if "v_pred" in file.tensors:
        return "v_prediction", "tensor v_pred"
    if declared:
        return "epsilon", f"metadata modelspec.prediction_type = {declared!r}"
    return "epsilon", "no sign of v-prediction; Stable Diffusion 1 was trained to predict noise"
