"""Stable Diffusion 3 as a family: 3 medium, 3.5 medium and 3.5 large, with or without T5."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, cat

from reverie.checkpoint.source import WeightFile
from reverie.errors import CheckpointError
from reverie.families.assembly import Plan, Use, assemble, check_widths, require
from reverie.families.base import Join, Parts, Sizes
from reverie.families.encoders import on_channels, penultimate_layer, t5_states
from reverie.families.family import FAMILIES, Family, Opened
from reverie.families.pieces import KINDS, Kind, Piece, Pieces
from reverie.families.pieces import Parts as NamedParts
from reverie.families.sd3 import configs, names
from reverie.families.single import Sight, TextPlace, TextRule, look, piece_of, text_piece, under, vae_piece
from reverie.nets.autoencoder import SD3_AUTOENCODER
from reverie.nets.mmdit import SD3_MEDIUM, MMDiT, MMDiTConfig
from reverie.nets.t5 import T5Encoder
from reverie.text.embed import Encoding
from reverie.text.t5_tokenizer import LENGTH
from reverie.types import Cond

NAME, TITLE = "sd3", names.TITLE
TRANSFORMER, T5 = names.TRANSFORMER, names.T5
TRANSFORMER_KIND = Kind(
    "transformer", MMDiT, lambda json, names: configs.transformer_config(json), configs.transformer_json
)
T5_KIND = Kind(
    "T5 text encoder", T5Encoder, lambda json, names: configs.t5_config(json), configs.t5_json, names.t5_tensors,
    ("model", "pytorch_model"),
)  # fmt: skip


def clip_l_piece(file: WeightFile, place: TextPlace, rule: TextRule) -> Piece:
    """CLIP-L of a file, with the identity for its projection."""
    piece = text_piece(file, place, rule)
    config = replace(piece.config, projection_width=piece.config.width)
    return replace(piece, config=config, tensors=lambda: names.clip_l_tensors(piece.tensors()))


def t5_piece(file: WeightFile, place: TextPlace, rule: TextRule) -> Piece:
    """T5 of a file."""
    config = names.t5_config_from_header(file.tensors, place.prefix)
    return piece_of(file, rule.part, T5_KIND, config, under(file, place.prefix), names.t5_tensors)


TEXTS = (
    TextRule(names.CLIP_L, (TextPlace(names.PREFIXES[names.CLIP_L]),), projected=True, reader=clip_l_piece),
    TextRule("text_encoder_2", (TextPlace(names.PREFIXES["text_encoder_2"]),), "gelu", projected=True),
    TextRule(T5, (TextPlace(names.PREFIXES[T5]),), t5=True, reader=t5_piece),
)
PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
SIZE = 128  # latents; `sample_size` of the published transformers, 1024 pixels
SCALE = {"scaling_factor": 1.5305, "shift_factor": 0.0609}  # sd3-ref `SD3LatentFormat`
# scheduler_config.json of stabilityai/stable-diffusion-3-medium-diffusers, -3.5-medium and -3.5-large.
FLOW: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def claims_file(sight: Sight) -> str | None:
    """The transformer's blocks."""
    return f"{sight.prefix}joint_blocks.*" if sight.network == TRANSFORMER else None


def claims_networks(pieces: Pieces) -> str | None:
    """The transformer."""
    return f"transformer/config.json: {configs.TRANSFORMER_CLASS}" if TRANSFORMER in pieces else None


def open_file(file: WeightFile, ema: bool) -> Pieces:
    """The networks of a single file.

    Raises:
        CheckpointError: a tensor of no part, or of an impossible shape; an averaged copy is asked for.
    """
    if ema:
        raise CheckpointError("such files hold no averaged copy; load it without ema")
    return {part: _piece(file, part) for part in names.by_part(file.tensors)}


def join_file(parts: NamedParts) -> dict[str, Tensor]:
    """The tensors of a single file."""
    shapes = {part: config for part, (config, _) in parts.items()}
    transformer, vae = shapes.get(TRANSFORMER, SD3_MEDIUM), shapes.get(names.VAE, SD3_AUTOENCODER)
    return names.join({part: tensors for part, (_, tensors) in parts.items()}, transformer, vae)


def _piece(file: WeightFile, part: str) -> Piece:
    if part == TRANSFORMER:
        own = under(file, look(file.tensors).prefix)
        config = names.config_from_header(file.tensors)
        return piece_of(file, part, TRANSFORMER_KIND, config, own, lambda t: names.transformer_from_file(t, config))
    if part == names.VAE:
        return vae_piece(file, names.PREFIXES[part])
    rule = next(rule for rule in TEXTS if rule.part == part)
    return rule.read(file, rule.places[0])


def join(config: MMDiTConfig) -> Join:
    """The rule (Esser et al. 2024, figure 2a): CLIP's contexts side by side, widened with zeros, then T5's behind
    them; zeros where there is no T5. Both pooled prompts are one vector.
    """

    def condition(encodings: Sequence[Encoding], sizes: Sizes) -> Cond:
        del sizes
        clips, t5 = encodings[:2], encodings[2:]
        clip = on_channels(clips)
        clip = F.pad(clip, (0, config.context_width - clip.shape[-1]))
        behind = t5[0].hidden.to(clip) if t5 else clip.new_zeros(len(clip), LENGTH, config.context_width)
        pooled = [encoding.pooled for encoding in clips if encoding.pooled is not None]
        return Cond(cat([clip, behind], dim=1), vector=cat(pooled, dim=-1))

    return condition


def _check(opened: Opened) -> None:
    """Refuse text encoders or a VAE that do not fit the transformer."""
    config = opened.pieces[TRANSFORMER].config
    first, second = (opened.pieces[rule.part].config for rule in TEXTS[:2])
    check_widths("the pooled prompt", first.projection_width + second.projection_width, config.vector_width)
    if first.width + second.width > config.context_width:
        check_widths("the prompt of CLIP's text encoders", first.width + second.width, config.context_width)
    if T5 in opened.pieces:
        check_widths("T5's prompt", opened.pieces[T5].config.width, config.context_width)
    if opened.pieces["vae"].config.latent_channels != config.in_channels:
        raise CheckpointError(
            f"the transformer takes {config.in_channels} channels of latents, the VAE has "
            f"{opened.pieces['vae'].config.latent_channels}; they are of different families"
        )


def plan(opened: Opened) -> Plan:
    """How the networks go together."""
    config = opened.pieces[TRANSFORMER].config
    uses = [Use(TEXTS[0].part, penultimate_layer), Use(TEXTS[1].part, penultimate_layer, pad="!")]
    evidence = [("prediction flow_prediction", f"{TITLE} was trained to predict the velocity of a straight path")]
    if T5 in opened.pieces:
        uses.append(Use(T5, t5_states))
    else:
        evidence.append(("text encoders", "no T5; the prompt has zeros in its place"))
    # The model cards of 3 medium, 3.5 large and 3.5 medium.
    steps, scale = (28, 7.0) if not config.qk_norm else (40, 4.5) if config.dual_attention else (28, 3.5)
    return Plan(
        tuple(uses), join(config), opened.scheduler or FLOW, tuple(evidence), SCALE, SIZE, steps=steps,
        guidance_scale=scale,
    )  # fmt: skip


def load(opened: Opened) -> Parts:
    """The networks, put together."""
    require(opened, FAMILY, (*(rule.part for rule in TEXTS[:2]), TRANSFORMER, "vae"))
    _check(opened)
    return assemble(opened, FAMILY, plan(opened))


FAMILY = Family(
    NAME, TITLE, TRANSFORMER, {**KINDS, TRANSFORMER: TRANSFORMER_KIND, T5: T5_KIND}, TEXTS, PIPELINES, claims_file,
    claims_networks, open_file, join_file, plan, load,
)  # fmt: skip
FAMILIES.add(NAME, FAMILY)
