"""Everything about a picture that is known before its first evaluation: which sampler runs over which sigmas."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from reverie.diffusion.spacing import TIMESTEP_SPACINGS, manual
from reverie.engine.request import Request
from reverie.errors import RequestError
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
        width, height: pixels drawn.
        sampler: what runs, with `options`.
        spacing, base: the spacing, and the timestep spacing that bounds it.
        sigmas: `(n + 1,)`, the noise levels visited; one alone where nothing is to be done.
        told: how a timestep is rounded before the network is told.
        guidance_scale: of this pass.
        over: whether it begins with a picture's latents under noise, not with noise alone.
        second: whether it is the second pass of a hires fix.
    """

    width: int
    height: int
    sampler: Sampler
    options: dict[str, Any]
    spacing: str
    base: str
    sigmas: Tensor
    told: Callable[[float], float]
    guidance_scale: float
    over: bool = False
    second: bool = False

    @property
    def steps(self) -> int:
        """How many steps are done."""
        return len(self.sigmas) - 1

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
    own = request.model_copy(update={name: value for name, value in changes.items() if value is not None})
    policy = request.strength_steps or preset_of(request).hires_steps
    return replace(_pass(model, own, (width, height), hires.strength, policy), second=True)


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
        *size, sampler, options, spacing, rules.base, sigmas, told, request.guidance_scale or 0.0,
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
        message = error.errors()[0]["msg"]
        raise RequestError(
            f"option {name} of sampler {sampler.name} is {value!r}: {message[0].lower()}{message[1:]}"
        ) from None
    return found
