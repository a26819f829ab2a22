"""One function draws every picture."""

import math
import secrets
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor

from reverie.diffusion.noise import SeededNoise
from reverie.diffusion.spacing import SPACINGS, TIMESTEP_SPACINGS, SpacingRules, space
from reverie.engine import latents as latent_space
from reverie.engine.request import MAX_SEED, Request
from reverie.errors import GenerationError, RequestError
from reverie.families.base import preconditioned
from reverie.sampling.guidance import classifier_free
from reverie.sampling.registry import Sampler, load_all
from reverie.sampling.wrappers import checked, watched
from reverie.types import Cond

if TYPE_CHECKING:
    from reverie.engine.bundle import Model

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Result:
    """What was drawn.

    Attributes:
        pixels: `(N, H, W, 3)` float32 in [0, 1], before rounding to bytes.
        latents: `(N, C, h, w)` float32, scaled as the U-Net sees them.
        request: the request with every default made explicit, the seed too.
        model: the source and hash of the model.
    """

    pixels: Tensor
    latents: Tensor
    request: Request
    model: dict[str, str]

    @cached_property
    def images(self) -> list[Image]:
        """PIL pictures; saved as PNG they carry their request."""
        from reverie.engine.image import to_images

        return to_images(self.pixels, self.request, self.model)


@dataclass(frozen=True)
class Plan:
    """Everything about a request that is known before the first evaluation."""

    request: Request
    sampler: Sampler
    sigmas: Tensor
    options: dict[str, Any]
    base: str
    told: Callable[[float], float]


def resolve(model: "Model", request: Request) -> Request:
    """Fill every None from the model's defaults, and names by their canonical form.

    Raises:
        RequestError: an unknown sampler or spacing, a size the network cannot draw, too long a clip skip.
    """
    parts, defaults = model.parts, model.parts.defaults
    samplers = load_all()
    chosen = {
        name: getattr(defaults, name)
        for name in ("width", "height", "steps", "guidance_scale", "upscaler")
        if getattr(request, name) is None
    }
    chosen["sampler"] = samplers.name(request.sampler or defaults.sampler)
    chosen["spacing"] = SPACINGS.name(request.spacing or defaults.spacing)
    if request.seed is None:
        chosen["seed"] = secrets.randbelow(2**32)
    full = request.model_copy(update=chosen)
    if (full.seed or 0) + full.count - 1 > MAX_SEED:
        raise RequestError(f"seed {full.seed} with count {full.count} goes beyond {MAX_SEED}, the largest seed")
    latent_space.check_size(parts, full.width or 0, full.height or 0)
    if full.eta is not None and "eta" not in samplers[chosen["sampler"]].options:
        raise RequestError(f"sampler {chosen['sampler']} has no eta; ddim and euler_a have")
    if full.clip_skip > parts.text_encoder.config.layers:
        raise RequestError(
            f"clip_skip is {full.clip_skip}; the text encoder has {parts.text_encoder.config.layers} layers"
        )
    _check_upscaler(full.upscaler)
    return full


def plan(model: "Model", request: Request) -> Plan:
    """Choose sampler, sigmas and options for a resolved request."""
    parts, defaults = model.parts, model.parts.defaults
    assert request.sampler and request.spacing and request.steps
    sampler = load_all()[request.sampler]
    own = request.spacing == defaults.spacing
    base = defaults.rules.base if own else request.spacing
    if base not in TIMESTEP_SPACINGS:
        base = "linspace"
    rules = SpacingRules(
        steps_offset=defaults.rules.steps_offset,
        extra_point=sampler.extra_point and request.spacing in TIMESTEP_SPACINGS,
        whole_timesteps=sampler.whole_timesteps,
        final_sigma=defaults.rules.final_sigma if request.sampler == defaults.sampler else 0.0,
        base=base,
    )
    sigmas = space(request.spacing, request.steps, parts.process, rules)
    options: dict[str, Any] = {}
    if request.eta is not None:
        options["eta"] = request.eta
    if sampler.fixed_stride and request.spacing in TIMESTEP_SPACINGS:
        options["stride"] = parts.process.steps // request.steps
    if sampler.name == "pndm" and parts.parameterisation.name == "v_prediction":
        options["quantity"] = "v_prediction"
    return Plan(request, sampler, sigmas, options, base, _rounding(sampler, request.spacing))


def generate(model: "Model", request: Request, *, progress: Progress | None = None) -> Result:
    """Draw `request` with `model`; see `Model.generate`."""
    request = resolve(model, request)
    results = list(batches(model, request, progress=progress))
    pixels, latents = torch.cat([r.pixels for r in results]), torch.cat([r.latents for r in results])
    return Result(pixels, latents, request, results[0].model)


def batches(model: "Model", request: Request, *, progress: Progress | None = None) -> Iterator[Result]:
    """Draw a resolved request, handing over each batch as soon as it is drawn, with the request for it alone."""
    from reverie.engine.image import fingerprint

    todo = plan(model, request)
    seed, size = request.seed or 0, request.batch_size
    firsts = range(0, request.count, size)
    done, total = 0, todo.sampler.evaluations(request.steps or 1) * len(firsts)

    def tell(sigma: float, x0: Tensor) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    conditions = encode(model, [request.prompt, request.negative_prompt], request.clip_skip)
    for first in firsts:
        count = min(size, request.count - first)
        latents = sample(model, todo, conditions, [seed + first + i for i in range(count)], tell)
        pixels = finish(model, latents, request.upscaler)
        own = request.model_copy(update={"seed": seed + first, "count": count})
        yield Result(pixels, latents.cpu(), own, fingerprint(model))


@torch.no_grad()
def encode(model: "Model", prompts: list[str], clip_skip: int) -> Tensor:
    """Prompts -> `(len(prompts), L, D)`. Words that do not fit are named in a warning, never lost in silence."""
    encoded = [model.parts.tokenizer(prompt) for prompt in prompts]
    for one in encoded:
        if one.cut:
            room = model.parts.tokenizer.max_length - 2
            warnings.warn(f"the prompt is longer than {room} tokens; not used: {one.lost!r}", stacklevel=2)
    ids = torch.tensor([one.ids for one in encoded], device=model.device)
    text_encoder = model.ready("text_encoder", model.parts.text_encoder)
    context: Tensor = text_encoder(ids, skip=clip_skip - 1)
    return context


@torch.no_grad()
def sample(
    model: "Model", todo: Plan, conditions: Tensor, seeds: list[int], tell: Callable[[float, Tensor], None]
) -> Tensor:
    """The latents of one batch, `(len(seeds), C, h, w)` float32 on the model's device."""
    parts, request = model.parts, todo.request
    unet = model.ready("unet", parts.unet)
    predict = preconditioned(unet, parts.process, parts.parameterisation, model.dtype, told=todo.told)
    batch, factor = len(seeds), parts.vae.config.factor
    positive, negative = (Cond(c.expand(batch, -1, -1)) for c in conditions[:, None])
    denoise = classifier_free(predict, positive, negative, request.guidance_scale or 0.0)
    denoise = watched(checked(denoise), tell)
    shape = (
        parts.vae.config.latent_channels,
        (request.height or 0) // factor,
        (request.width or 0) // factor,
    )
    noise = SeededNoise(seeds, shape, model.device)
    x = latent_space.start(
        noise(), float(todo.sigmas[0]), parts.process, todo.sampler, request.spacing or "", todo.base
    )
    x = todo.sampler.function(denoise, x, todo.sigmas, noise=noise, process=parts.process, **todo.options)
    latents: Tensor = x / parts.process.scale(float(todo.sigmas[-1]))
    return latents


@torch.no_grad()
def finish(model: "Model", latents: Tensor, upscaler: str | None) -> Tensor:
    """Latents -> pixels `(B, H, W, 3)` float32 on the CPU, upscaled where asked."""
    vae = model.ready("vae", model.parts.vae)
    pixels = latent_space.decode(vae, latents, model.dtype)
    if not torch.isfinite(pixels).all():
        raise GenerationError("the decoded picture is not finite; try precision float32")
    if upscaler not in {None, "none"}:
        from reverie.engine.upscale import upscale

        pixels = upscale(pixels, str(upscaler))
    return pixels.permute(0, 2, 3, 1).float().cpu().contiguous()


def _rounding(sampler: Sampler, spacing: str) -> Callable[[float], float]:
    """How diffusers' class for this sampler rounds the timestep that the network is told."""
    if not sampler.whole_timesteps:
        return float
    return _truncated if spacing == "exponential" else round


def _truncated(timestep: float) -> float:
    """DPMSolverMultistep casts its exponential timesteps to integers; T-1 has by then become T-1 minus an ulp."""
    return max(math.floor(timestep - 1e-6), 0)


def _check_upscaler(name: str | None) -> None:
    from reverie.engine.upscale import UPSCALERS

    if name not in {None, "none"}:
        UPSCALERS.name(str(name))
