"""The same drawing by diffusers and by us, from embeddings to latents, for adapters that act on the way.

Euler's method has its samples in the units that our samplers have, so that latents are compared as they are.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reverie.families import configs
from reverie.families.base import Parts, Sizes, preconditioned
from reverie.families.detect import load_parts
from reverie.nets.unet import UNet
from reverie.sampling.guidance import Clock, Conditions, Guidance, Weight, guided
from reverie.sampling.registry import load_all
from reverie.text.embed import Encoding
from reverie.types import Cond, Predict
from tests import tiny
from tests.families import published

STEPS, SCALE, TOKENS = 4, 5.0, 7
HEIGHT, WIDTH = 48, 32
EULER = tiny.SCHEDULER | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
Wrap = Callable[[Predict, Clock], Predict]
Extend = Callable[[Cond, str], Cond]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def parts_of(folder: Path) -> Parts:
    return load_parts(folder)


def oracle(folder: Path, pipeline: str, **parts: Any) -> Any:
    """A pipeline of diffusers around the networks of a folder; prompts are given to it as embeddings."""
    text: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer"))
    if "XL" in pipeline:
        text |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    else:
        text |= {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    if (folder / "unet").exists():
        parts = {"unet": tiny.diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")} | parts
    pipe = getattr(tiny.diffusers, pipeline)(
        vae=tiny.diffusers.AutoencoderKL.from_pretrained(folder / "vae"), scheduler=tiny.scheduler_of(EULER),
        **(text | parts),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_processor(size: int) -> Any:
    """That of transformers which needs no torchvision."""
    module = import_module("transformers.models.clip.image_processing_pil_clip")
    return module.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)


def embeddings(parts: Parts) -> tuple[dict[str, Tensor], Conditions]:
    """Any embeddings of a prompt and a negative prompt: as diffusers takes them, and as our conditions."""
    width = parts.unet.config.context_width
    hidden, empty = rand(1, TOKENS, width, seed=1), rand(1, TOKENS, width, seed=2)
    given = {"prompt_embeds": hidden, "negative_prompt_embeds": empty}
    if parts.identity.family != "sdxl":
        return given, Conditions(((1.0, Cond(hidden)),), ((1.0, Cond(empty)),))
    pooled, nothing = rand(1, 24, seed=3), rand(1, 24, seed=4)
    given |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": nothing}
    size = Sizes(width=WIDTH, height=HEIGHT)

    def told(both: Tensor, pool: Tensor) -> Cond:
        first = parts.text_encoder.config.width
        return parts.condition([Encoding(both[..., :first]), Encoding(both[..., first:], pool)], size)

    return given, Conditions(((1.0, told(hidden, pooled)),), ((1.0, told(empty, nothing)),))


def reference(
    pipe: Any, given: dict[str, Tensor], size: tuple[int, int] = (HEIGHT, WIDTH), steps: int = STEPS, **arguments: Any
) -> Tensor:
    """The latents that diffusers draws of a picture of `height, width` pixels."""
    height, width = size
    shape = (1, 4, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    result: Tensor = pipe(
        **given, latents=rand(*shape, seed=5), num_inference_steps=steps, guidance_scale=SCALE, height=height,
        width=width, output_type="latent", **arguments,
    ).images  # fmt: skip
    return result


def predict_of(parts: Parts) -> Predict:
    """Our network, no adapter."""
    return torch.no_grad()(preconditioned(parts.unet, parts.process, parts.parameterisation, torch.float32))


def ours(
    parts: Parts,
    conditions: Conditions,
    wrap: Wrap = lambda predict, clock: predict,
    extend: Extend = lambda cond, role: cond,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    steps: int = STEPS,
) -> Tensor:
    """The latents that we draw.

    Args:
        wrap: what an adapter makes of `predict`.
        extend: what it adds to the condition of a role, `positive` or `negative`.
    """
    scheduler = tiny.scheduler_of(EULER)
    scheduler.set_timesteps(steps)
    clock = Clock.of(scheduler.sigmas)
    extended = Conditions(
        tuple((weight, extend(cond, "positive")) for weight, cond in conditions.positive),
        tuple((weight, extend(cond, "negative")) for weight, cond in conditions.negative),
    )
    denoise = guided(
        wrap(predict_of(parts), clock), lambda _: extended, Guidance(weight=Weight(SCALE)), clock,
        parts.parameterisation,
    )  # fmt: skip
    factor = parts.vae.config.factor
    x = rand(1, 4, size[0] // factor, size[1] // factor, seed=5) * scheduler.init_noise_sigma
    euler = load_all()["euler"].function
    with torch.no_grad():
        return euler(denoise, x, scheduler.sigmas, noise=lambda: torch.zeros_like(x), process=parts.process)


def at_true_size(folder: Path) -> tuple[Any, Parts]:
    """A U-Net of Stable Diffusion 1.5's shape with random weights, diffusers' and ours, which share them."""
    torch.manual_seed(0)
    theirs = tiny.diffusers.UNet2DConditionModel(**published.SD1).eval()
    with torch.device("meta"):
        unet = UNet(configs.unet_config(published.SD1))
    unet.load_state_dict(theirs.state_dict(), assign=True)
    return theirs, replace(parts_of(folder), unet=unet.eval().requires_grad_(False))
