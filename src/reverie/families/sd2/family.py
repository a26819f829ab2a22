"""Stable Diffusion 2 as a family: 512 (epsilon) and 768 (v), inpainting, depth, x4 upscaler, unCLIP."""

from functools import partial
from typing import Any

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
from reverie.families.sd2.augmentation import encoded, image_encoder, upscaled
from reverie.families.single import Sight, TextPlace, TextRule

NAME, TITLE = "sd2", "Stable Diffusion 2"
CONTEXT = 1024  # OpenCLIP ViT-H/14
LDM = "cond_stage_model.model."
# The last of 24 layers is not used (Stability v2-inference.yaml `layer: penultimate`): as in the published folders,
# which have 23, what follows the layer before it is the final norm.
TEXTS = (TextRule("text_encoder", (TextPlace(LDM, open_clip=True),), "gelu", most_layers=23),)
PIPELINES = (
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline", "StableDiffusionDepth2ImgPipeline", "StableDiffusionUpscalePipeline",
    "StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline",
)  # fmt: skip
# scheduler_config.json of stabilityai/stable-diffusion-2-base, -2-inpainting, -2-depth; of -2 and -2-1 (768, v); and
# of stable-diffusion-x4-upscaler.
NOISE: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
EPSILON = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "prediction_type": "epsilon"} | NOISE
V = {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction"} | NOISE
UPSCALER = V | {"beta_start": 0.0001, "beta_end": 0.02}
# VAE: Stability v2-inference.yaml and x4-upscaling.yaml `scale_factor`.
SCALE, UPSCALER_SCALE = {"scaling_factor": 0.18215}, {"scaling_factor": 0.08333}
# Rows of latents: `sample_size` of the published U-Nets.
SIZES = {"epsilon": 64, "v_prediction": 96, "x4-upscaler": 128}
# In the models that predict v the bias of one norm is far from zero, in the others it is not: the sign by which
# programs tell the files apart, which otherwise have the same header.
FAR = 0.09
SIGN = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
SIGNS = (f"model.diffusion_model.{SIGN}", SIGN, "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias")


def claims_file(sight: Sight) -> str | None:
    """A U-Net beside OpenCLIP's text encoder; alone, one whose prompt is 1024 wide."""
    if sight.network != "unet":
        return None
    if sight.has(LDM):
        return f"{sight.prefix}input_blocks.* and {LDM}* (OpenCLIP)"
    return by_prompt(sight, CONTEXT)


def claims_networks(pieces: Pieces) -> str | None:
    """A U-Net without SDXL's vector, and a text encoder with OpenCLIP's activation, or a prompt 1024 wide."""
    if "unet" not in pieces or pieces["unet"].config.vector == "add_embedding":
        return None
    return by_text_encoder(pieces, "gelu", CONTEXT)


def open_file(file: WeightFile, ema: bool) -> Pieces:
    """The networks of a single file."""
    return single.model_pieces(file, TEXTS, vector="class_embedding", title=TITLE, ema=ema)


def join_file(parts: NamedParts) -> dict[str, Tensor]:
    """The tensors of a single file."""
    return single.joined(parts, TEXTS)


def guessed(opened: Opened, variant: str) -> Prediction:
    """What the U-Net predicts, where nothing says so: of the plain ones, by one of their weights."""
    if variant in {"x4-upscaler", "unclip"}:
        return Prediction("v_prediction", f"the published {variant} model predicts v")
    if variant:
        return Prediction("epsilon", f"the published {variant} model predicts noise")
    file = opened.file
    sign = next((name for name in SIGNS if file and name in file.tensors), None)
    if file is None or sign is None:
        return Prediction("epsilon", "no sign of v-prediction")
    spread = float(file.tensor(sign).float().std(correction=0))
    name = "v_prediction" if spread > FAR else "epsilon"
    return Prediction(name, f"{sign} has standard deviation {spread:.3g}; above {FAR} the model predicts v")


def plan(opened: Opened) -> Plan:
    """How the networks go together."""
    unet, vae = opened.pieces["unet"].config, opened.pieces["vae"].config
    check_widths("the text encoder", opened.pieces["text_encoder"].config.width, unet.context_width)
    variant, evidence = variant_of(unet, vae.latent_channels)
    upscaler = variant == "x4-upscaler"

    def published(prediction: str) -> Json:
        return UPSCALER if upscaler else V if prediction == "v_prediction" else EPSILON

    scheduler, why = scheduler_of(opened, published, lambda: guessed(opened, variant))
    size = SIZES["x4-upscaler" if upscaler else str(scheduler.get("prediction_type", "epsilon"))]
    return Plan(
        (Use("text_encoder", last_layer, pad="!"),), context_alone, scheduler, (*evidence, why),
        UPSCALER_SCALE if upscaler else SCALE, size,
        steps=75 if upscaler else 50, guidance_scale=9.0 if upscaler else 7.5, variant=variant, tables="sd1",
        augmentation=upscaled(opened) if upscaler else encoded(opened) if variant == "unclip" else None,
        image_encoder=partial(image_encoder, opened) if variant == "unclip" else None,
    )  # fmt: skip


def load(opened: Opened) -> Parts:
    """The networks, put together."""
    return with_unet(opened, FAMILY, plan)


FAMILY = Family(
    NAME, TITLE, "unet", KINDS, TEXTS, PIPELINES, claims_file, claims_networks, open_file, join_file, plan, load
)  # fmt: skip
FAMILIES.add(NAME, FAMILY)
