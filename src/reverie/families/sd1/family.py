"""Stable Diffusion 1 as a family."""

from torch import Tensor

from reverie.checkpoint.source import WeightFile
from reverie.families import single
from reverie.families.assembly import Plan, Use, check_widths, variant_of, with_unet
from reverie.families.base import Parts
from reverie.families.encoders import context_alone, last_layer
from reverie.families.family import FAMILIES, Family, Opened, by_prompt, by_text_encoder
from reverie.families.json_config import Json
from reverie.families.pieces import KINDS, Pieces
from reverie.families.pieces import Parts as NamedParts
from reverie.families.prediction import Prediction, scheduler_of
from reverie.families.scheduler import SD1_SCHEDULER
from reverie.families.single import Sight, TextPlace, TextRule

NAME, TITLE = "sd1", "Stable Diffusion 1"
SIZE = 64  # latents; `sample_size` of the published U-Net, 512 pixels
SCALE = {"scaling_factor": 0.18215}  # CompVis v1-inference.yaml `scale_factor`
CONTEXT = 768  # CLIP ViT-L/14
LDM, COMFY = "cond_stage_model.transformer.", "text_encoders.clip_l.transformer."
TEXTS = (TextRule("text_encoder", (TextPlace(LDM), TextPlace(COMFY))),)
PIPELINES = (
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline", "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)  # fmt: skip


def claims_file(sight: Sight) -> str | None:
    """A U-Net without a vector beside CLIP's text encoder; alone, one whose prompt is 768 wide."""
    if sight.network != "unet" or sight.vector:
        return None
    if sight.has(LDM):
        return f"{sight.prefix}input_blocks.* and {LDM}* (CLIP from transformers)"
    if sight.has(COMFY):
        return f"{sight.prefix}input_blocks.* without label_emb, and {COMFY}*"
    return by_prompt(sight, CONTEXT)


def claims_networks(pieces: Pieces) -> str | None:
    """A U-Net without a vector, and a text encoder with OpenAI's activation; without one, a prompt 768 wide."""
    if "unet" not in pieces or pieces["unet"].config.vector:
        return None
    return by_text_encoder(pieces, "quick_gelu", CONTEXT)


def open_file(file: WeightFile, ema: bool) -> Pieces:
    """The networks of a single file."""
    return single.model_pieces(file, TEXTS, vector="", title=TITLE, ema=ema)


def join_file(parts: NamedParts) -> dict[str, Tensor]:
    """The tensors of a single file."""
    return single.joined(parts, TEXTS)


def published(prediction: str) -> Json:
    """The scheduler of the published folders, for either prediction type."""
    return SD1_SCHEDULER | {"prediction_type": prediction}


def plan(opened: Opened) -> Plan:
    """How the networks go together."""
    unet, vae = opened.pieces["unet"].config, opened.pieces["vae"].config
    check_widths("the text encoder", opened.pieces["text_encoder"].config.width, unet.context_width)
    variant, evidence = variant_of(unet, vae.latent_channels)
    unsaid = Prediction("epsilon", f"no sign of v-prediction; {TITLE} was trained to predict noise")
    scheduler, why = scheduler_of(opened, published, lambda: unsaid)
    return Plan(
        (Use("text_encoder", last_layer),), context_alone, scheduler, (*evidence, why), SCALE, SIZE,
        steps=50, guidance_scale=7.5, variant=variant,
    )  # fmt: skip


def load(opened: Opened) -> Parts:
    """The networks, put together."""
    return with_unet(opened, FAMILY, plan)


FAMILY = Family(
    NAME, TITLE, "unet", KINDS, TEXTS, PIPELINES, claims_file, claims_networks, open_file, join_file, plan, load
)  # fmt: skip
FAMILIES.add(NAME, FAMILY)
