"""Everything about a picture that is known before its first evaluation: which sampler runs over which sigmas."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from reverie.diffusion.process import EdmProcess
from reverie.diffusion.spacing import TIMESTEP_SPACINGS, manual
from reverie.engine.request import HANDED_OVER, Refine, Request
from reverie.errors import RequestError, unfit
from reverie.sampling.exponential import FEW_STEPS
from reverie.sampling.presets import PRESETS, Preset, img2img_sigmas, told_timestep, visited
from reverie.sampling.registry import Sampler, load_all

if TYPE_CHECKING:
    from reverie.engine.bundle import Model

USUAL = 60  # evaluations of dpm_adaptive at its default tolerance on Stable Diffusion's range of sigmas
# Without a preset: as diffusers, but every picture has a generator of its own, and names mean what they say.
OURS = replace(PRESETS["diffusers"], name="reverie", means={}, seeds="picture")


@dataclass(frozen=True, eq=False)
class Pass:
    """One run of a sampler.

    Attributes:
        model: what draws.
        width, height: pixels drawn.
        sampler: what runs, with `options`.
        spacing, base: the spacing, and the timestep spacing that bounds it.
        sigmas: `(n + 1,)`, the noise levels visited; one alone where nothing is to be done.
        path: `(m + 1,)`, the same with those that are visited before and after with another model.
        told: how a timestep is rounded before the network is told.
        guidance_scale: of this pass.
        over: whether it begins with a picture's latents under noise, not with noise alone.
        second: whether it is the second pass of a hires fix.
        after: what it begins with: `nothing` that was drawn; the `enlarged` latents of the pass before; its `latents`;
            its `sample`, noise and all.
        then: what answers from its first noise level on, in this same run of the sampler.
    """

    model: "Model"
    width: int
    height: int
    sampler: Sampler
    options: dict[str, Any]
    spacing: str
    base: str
    sigmas: Tensor
    path: Tensor
    told: Callable[[float], float]
    guidance_scale: float
    over: bool = False
    second: bool = False
    after: Literal["nothing", "enlarged", "latents", "sample"] = "nothing"
    then: "Pass | None" = None

    @property
    def steps(self) -> int:
        """How many steps are done."""
        return len(self.sigmas) - 1

    @property
    def whole_steps(self) -> int:
        """The same with those of the other model."""
        return len(self.path) - 1

    @property
    def evaluations(self) -> int:
        """How often `denoise` is asked; of samplers that choose their own steps, what is usual."""
        if not self.steps:
            return 0
        return USUAL if self.sampler.adaptive else self.sampler.evaluations(self.steps)


def preset_of(request: Request) -> Preset:
    """The preset of a request, or our own habits."""
    return PRESETS[request.preset] if request.preset else OURS


def plan(model: "Model", request: Request, size: tuple[int, int], over: bool) -> Pass:
    """The first pass of a resolved request.

    Args:
        size: width and height in pixels.
        over: whether it begins with a picture.

    Raises:
        RequestError: an option that the sampler has not, sigmas that cannot be.
    """
    strength = (1.0 if request.strength is None else request.strength) if over else None
    return _pass(model, request, size, strength, request.strength_steps or preset_of(request).strength_steps)


def second_plan(model: "Model", request: Request, first: Pass) -> Pass | None:
    """The second pass of a hires fix, where there is one.

    Raises:
        RequestError: as `plan`.
    """
    hires = request.hires
    if hires is None:
        return None
    factor = model.parts.vae.config.factor
    wanted = (hires.width or first.width * hires.scale, hires.height or first.height * hires.scale)
    width, height = (round(side / factor) * factor for side in wanted)
    if (width, height) < (first.width, first.height):
        raise RequestError(f"hires is {width}x{height}, smaller than the first pass ({first.width}x{first.height})")
    changes = {name: getattr(hires, name) for name in ("steps", "sampler", "spacing", "guidance_scale")}
    update = {name: value for name, value in changes.items() if value is not None}
    own = request.model_copy(update=update | {"sigmas": None})  # which say where the first pass begins
    policy = request.strength_steps or preset_of(request).hires_steps
    return replace(_pass(model, own, (width, height), hires.strength, policy), second=True, after="enlarged")


def refined(model: "Model", request: Request, last: Pass) -> tuple[Pass, ...]:
    """The last pass of a resolved request, divided with the model that takes over, or followed by its own.

    Raises:
        RequestError: as `plan`; one of the models would have no step.
    """
    refine = request.refine
    if refine is None:
        return (last,)
    other = model.successor(refine.model)
    scale = last.guidance_scale if refine.guidance_scale is None else refine.guidance_scale
    if refine.strength is None:
        return _divided(request, last, replace(last, model=other, guidance_scale=scale), refine)
    update = {"steps": refine.steps or request.steps, "sampler": last.sampler.name, "spacing": last.spacing}
    own = request.model_copy(update=update | {"guidance_scale": scale, "sigmas": None})
    policy = request.strength_steps or preset_of(request).strength_steps
    again = _pass(other, own, (last.width, last.height), refine.strength, policy)
    return last, replace(again, second=last.second, after="latents")


def _divided(request: Request, first: Pass, rest: Pass, refine: Refine) -> tuple[Pass, ...]:
    """One path for two models.

    In AUTOMATIC1111 the sampler runs on and its multistep memory with it; in diffusers and ComfyUI it runs anew for
    each model.
    """
    at = HANDED_OVER if refine.at is None else refine.at
    cut, steps = _place(first, at, by_steps=preset_of(request).name == "comfy"), first.steps
    if not 0 < cut < steps:
        who = "first model" if cut == 0 else "refiner"
        raise RequestError(f"refine at {at:g} leaves the {who} none of {steps} steps; take another place or more steps")
    sampler, preset = first.sampler, preset_of(request)
    told = told_timestep(preset, sampler, first.spacing, rest.model.parts.process)
    rest = replace(rest, sigmas=first.sigmas[cut:], told=told, after="sample")
    if preset.name == "a1111":
        return (replace(first, then=rest),)
    own = _options(rest.model, request, sampler, preset)
    if "lower_order_final" in sampler.options:
        few = inspect.signature(sampler.function).parameters["lower_order_final"].default is None
        own = ({"lower_order_final": steps < FEW_STEPS} if few else {}) | own
    if sampler.name == "pndm" and steps - cut > 1 and preset.strength_steps == "diffusers":
        own["skip"] = True
    unfinished = {name: False for name in ("lower_order_final", "euler_at_final") if name in sampler.options}
    first = replace(first, sigmas=first.sigmas[: cut + 1], options=first.options | unfinished)
    return first, replace(rest, options=own)


def _place(run: Pass, at: float, *, by_steps: bool) -> int:
    """The step at which a share of the training timesteps is done, by diffusers' rule (`denoising_end`).

    Args:
        by_steps: a share of the steps instead (ComfyUI's `start_at_step`).
    """
    process = run.model.parts.process
    if by_steps or isinstance(process, EdmProcess):  # which has no timesteps
        return round(at * run.steps)
    border = round(process.steps - at * process.steps) - 1e-3  # a timestep is found from its sigma, rounded
    return sum(run.told(process.timestep(sigma)) >= border for sigma in run.sigmas[:-1].tolist())


def _pass(model: "Model", request: Request, size: tuple[int, int], strength: float | None, policy: Any) -> Pass:
    parts, defaults, preset = model.parts, model.parts.defaults, preset_of(request)
    assert request.sampler and request.spacing and request.steps
    sampler, spacing = load_all()[request.sampler], request.spacing
    base = defaults.rules.base if spacing == defaults.spacing else spacing
    rules = replace(
        defaults.rules,
        base=base if base in TIMESTEP_SPACINGS else "linspace",
        final_sigma=defaults.rules.final_sigma if request.sampler == defaults.sampler else 0.0,
        discard_penultimate=bool(request.discard_penultimate),
    )
    if request.discard_penultimate is False:
        preset = replace(preset, name=f"{preset.name} with every sigma")  # so that no sampler's habit applies

    own_options = defaults.spacing_options if spacing == defaults.spacing and not preset.from_model else {}

    def make(n: int) -> Tensor:
        options = {**own_options, **request.spacing_options}
        return visited(preset, sampler.name, spacing, n, parts.process, rules, **options)

    if request.sigmas is not None:
        sigmas = manual(request.sigmas, parts.process)
    elif strength is None:
        sigmas = make(request.steps)
    else:
        sigmas = img2img_sigmas(policy, request.steps, strength, make)
    options = _options(model, request, sampler, preset)
    if sampler.name == "pndm" and strength is not None and policy == "diffusers":
        whole = make(request.steps)
        if 1 < len(sigmas) <= len(whole) - 2:
            sigmas, options["skip"] = whole[-len(sigmas) - 1 :], True
    told = told_timestep(preset, sampler, spacing, parts.process)
    return Pass(
        model, *size, sampler, options, spacing, rules.base, sigmas, sigmas, told, request.guidance_scale or 0.0,
        over=strength is not None,
    )  # fmt: skip


def _options(model: "Model", request: Request, sampler: Sampler, preset: Preset) -> dict[str, Any]:
    """Settings of the sampler: diffusers' habits, the model's, the preset's, the request's."""
    parts, defaults = model.parts, model.parts.defaults
    options: dict[str, Any] = {}
    class_rules = preset.timesteps == "class" and request.spacing in TIMESTEP_SPACINGS
    if sampler.fixed_stride and class_rules and request.sigmas is None:
        options["stride"] = parts.process.steps // (request.steps or 1)
    if sampler.name == "pndm" and parts.parameterisation.name == "v_prediction":
        options["quantity"] = "v_prediction"
    if request.sampler == defaults.sampler:
        options |= defaults.options
    options |= preset.options.get(sampler.name, {})
    given = dict(request.sampler_options)
    if request.eta is not None:
        given["eta"] = request.eta
    return options | {name: _checked(sampler, name, value) for name, value in given.items()}


def _checked(sampler: Sampler, name: str, value: object) -> object:
    """A setting of the sampler, of the kind that its function wants.

    Raises:
        RequestError: no such setting, or a value of another kind.
    """
    if name not in sampler.options:
        known = f"it has {', '.join(sampler.options)}" if sampler.options else "it has none"
        raise RequestError(f"sampler {sampler.name} has no option {name!r}; {known}")
    kind = get_type_hints(sampler.function)[name]
    try:
        found: object = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise RequestError(unfit(f"option {name} of sampler {sampler.name}", value, why)) from None
    return found
