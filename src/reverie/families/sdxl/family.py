"""Stable Diffusion XL as a family: base, refiner, SSD-1B, Vega, KOALA, Playground 2.5, CosXL and their kin."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from reverie.checkpoint.source import WeightFile
from reverie.errors import CheckpointError
from reverie.families import single
from reverie.families.assembly import Plan, Use, check_widths, variant_of, with_unet
from reverie.families.base import Parts
from reverie.families.configs import latent_statistics
from reverie.families.encoders import penultimate_layer
from reverie.families.family import FAMILIES, Evidence, Family, Opened
from reverie.families.json_config import Json, JsonConfig
from reverie.families.pieces import KINDS, Pieces
from reverie.families.pieces import Parts as NamedParts
from reverie.families.prediction import Prediction, numbers, scheduler_of
from reverie.families.sdxl.condition import join, size_width
from reverie.families.single import Sight, TextPlace, TextRule

NAME, TITLE = "sdxl", "Stable Diffusion XL"
BASE, REFINER = 2048, 1280  # width of the prompt: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14 side by side, or the latter
COMFY = "text_encoders."
TEXTS = (
    TextRule(
        "text_encoder", (TextPlace("conditioner.embedders.0.transformer."), TextPlace(f"{COMFY}clip_l.transformer."))
    ),
    TextRule(
        "text_encoder_2",
        (
            TextPlace("conditioner.embedders.1.model.", open_clip=True),
            TextPlace("conditioner.embedders.0.model.", open_clip=True),  # the refiner
            TextPlace(f"{COMFY}clip_g.transformer."),
        ),
        "gelu",
        projected=True,
    ),
)
PIPELINES = (
    "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
)  # fmt: skip
VECTORS = ("label_emb.0.0.weight", "add_embedding.linear_1.weight")
SIZE = 128  # latents; `sample_size` of the published U-Nets, 1024 pixels
SCALE: dict[str, Any] = {"scaling_factor": 0.13025}  # Stability sd_xl_base.yaml `scale_factor`
# scheduler_config.json of stabilityai/stable-diffusion-xl-base-1.0 and -refiner-1.0.
EULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "steps_offset": 1, "timestep_spacing": "leading",
    "interpolation_type": "linear", "use_karras_sigmas": False,
}  # fmt: skip
# scheduler_config.json of playgroundai/playground-v2.5-1024px-aesthetic.
PLAYGROUND: dict[str, Any] = {
    "_class_name": "EDMDPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "euler_at_final": False,
    "final_sigmas_type": "zero", "lower_order_final": True, "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "rho": 7.0, "sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002,
    "solver_order": 2, "solver_type": "midpoint",
}  # fmt: skip
# How diffusers' documentation draws CosXL (pipeline_stable_diffusion_xl_instruct_pix2pix.py).
COSXL: dict[str, Any] = {
    "_class_name": "EDMEulerScheduler", "num_train_timesteps": 1000, "prediction_type": "v_prediction",
    "sigma_data": 1.0, "sigma_max": 120.0, "sigma_min": 0.002, "sigma_schedule": "exponential",
}  # fmt: skip


def claims_file(sight: Sight) -> str | None:
    """A U-Net with a vector (`label_emb`) beside Stability's conditioner; alone, by how wide its prompt is."""
    if sight.network != "unet" or sight.vector not in VECTORS:
        return None
    if sight.has("conditioner.", COMFY):
        return f"{sight.prefix}{sight.vector} and conditioner.embedders.*"
    if not sight.has_text and sight.context_width in (BASE, REFINER):
        return f"{sight.vector} and a prompt {sight.context_width} wide, and no text encoder"
    return None


def claims_networks(pieces: Pieces) -> str | None:
    """A U-Net with SDXL's vector."""
    unet = pieces.get("unet")
    said = "unet/config.json: addition_embed_type text_time"
    return said if unet is not None and unet.config.vector == "add_embedding" else None


def open_file(file: WeightFile, ema: bool) -> Pieces:
    """The networks of a single file."""
    return single.model_pieces(file, TEXTS, vector="add_embedding", title=TITLE, ema=ema)


def join_file(parts: NamedParts) -> dict[str, Tensor]:
    """The tensors of a single file; without the first text encoder one of the refiner."""
    alone = () if "text_encoder" in parts else (replace(TEXTS[1], places=TEXTS[1].places[1:]),)
    return single.joined(parts, alone or TEXTS)


def is_refiner(opened: Opened) -> bool:
    """Whether the prompt comes from the second text encoder alone."""
    second, width = opened.pieces.get("text_encoder_2"), opened.pieces["unet"].config.context_width
    return "text_encoder" not in opened.pieces and (REFINER if second is None else second.config.width) == width


def is_scored(opened: Opened) -> bool:
    """Whether the U-Net is told an aesthetic score."""
    return _index(opened).flag("requires_aesthetics_score", is_refiner(opened))


def _index(opened: Opened) -> JsonConfig:
    return JsonConfig(opened.index, "model_index.json")


def schedule(opened: Opened) -> tuple[Json, Evidence, dict[str, Any]]:
    """The scheduler, the evidence for what is predicted, and the scale of the latents."""
    file = opened.file
    if file is not None and {"edm_mean", "edm_std"} <= file.tensors.keys():
        values = {f"latents_{name}": numbers(file, f"edm_{name}") for name in ("mean", "std")}
        mean, std = latent_statistics(JsonConfig(values, str(file.path)), opened.pieces["vae"].config.latent_channels)
        scale = {"scaling_factor": 0.5, "latents_mean": mean, "latents_std": std}  # its vae/config.json
        return PLAYGROUND, ("prediction edm", "tensors edm_mean and edm_std (Playground 2.5)"), scale
    if file is not None and "edm_vpred.sigma_max" in file.tensors:
        return COSXL | edm_range(file), ("prediction edm_v", "tensor edm_vpred.sigma_max (CosXL)"), SCALE
    unsaid = Prediction("epsilon", f"no sign of v-prediction; {TITLE} was trained to predict noise")
    return *scheduler_of(opened, lambda prediction: EULER, lambda: unsaid), SCALE


def edm_range(file: WeightFile) -> dict[str, float]:
    """The ends of CosXL's noise levels, where its file says them.

    Raises:
        CheckpointError: not one number each.
    """
    found = {}
    for end in ("sigma_min", "sigma_max"):
        values = numbers(file, f"edm_vpred.{end}") if f"edm_vpred.{end}" in file.tensors else [COSXL[end]]
        if len(values) != 1:
            raise CheckpointError(f"{file.path}: tensor edm_vpred.{end} holds {len(values)} numbers; expected one")
        found[end] = values[0]
    return found


def plan(opened: Opened) -> Plan:
    """How the networks go together."""
    unet, vae = opened.pieces["unet"].config, opened.pieces["vae"].config
    refiner = is_refiner(opened)
    scored = is_scored(opened)
    uses = (Use("text_encoder", penultimate_layer), Use("text_encoder_2", penultimate_layer, pad="!"))[refiner:]
    configs = [opened.pieces[use.part].config for use in uses]
    check_widths("the prompt of the text encoders", sum(config.width for config in configs), unet.context_width)
    width = size_width(unet.vector_width, configs[-1].projection_width or configs[-1].width, scored=scored)
    variant, evidence = variant_of(unet, vae.latent_channels)
    if refiner and not variant:
        variant, evidence = "refiner", (("variant refiner", "the prompt comes from the second text encoder alone"),)
    scheduler, why, scale = schedule(opened)
    return Plan(
        uses, join(width, scored=scored), scheduler, (*evidence, why), scale, SIZE, steps=50,
        guidance_scale=3.0 if scheduler.get("sigma_data") == PLAYGROUND["sigma_data"] else 5.0,
        variant=variant, zero_empty=_index(opened).flag("force_zeros_for_empty_prompt", not refiner),
        sizes=("original_size", "crop", "aesthetic_score" if scored else "target_size"),
        network={"size_width": width},
    )  # fmt: skip


def load(opened: Opened) -> Parts:
    """The networks, put together."""
    first = () if "unet" in opened.pieces and is_refiner(opened) else ("text_encoder",)
    return with_unet(opened, FAMILY, plan, (*first, "text_encoder_2"))


FAMILY = Family(
    NAME, TITLE, "unet", KINDS, TEXTS, PIPELINES, claims_file, claims_networks, open_file, join_file, plan, load
)  # fmt: skip
FAMILIES.add(NAME, FAMILY)
