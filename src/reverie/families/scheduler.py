"""A diffusers scheduler config becomes the model's process, parameterisation and defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reverie.diffusion.parameterisation import PARAMETERISATIONS, Parameterisation
from reverie.diffusion.process import NOISE_SCHEDULES, Process, rescale_zero_terminal_snr
from reverie.diffusion.spacing import TIMESTEP_SPACINGS, SpacingRules
from reverie.errors import CheckpointError
from reverie.sampling.registry import SAMPLERS, load_all

# The scheduler of runwayml's and CompVis' Stable Diffusion 1 folders: what a file without a config gets.
SD1_SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "timestep_spacing": "leading", "prediction_type": "epsilon",
}  # fmt: skip

MOST = 100_000  # of any number in a scheduler config; the largest that is used is 1,000 training timesteps

# What each class does where its config does not say (diffusers' own constructor defaults).
SPACING_OF_CLASS = {
    "DDIMScheduler": "leading", "DDPMScheduler": "leading", "PNDMScheduler": "leading",
}  # fmt: skip

# Values that would change the picture in a way we do not do; anything else is refused rather than ignored.
REFUSED: dict[str, dict[str, tuple[object, ...]]] = {
    "": {"thresholding": (False, None), "use_beta_sigmas": (False, None), "trained_betas": (None,)},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++",), "solver_order": (2,), "solver_type": ("midpoint",),
        "use_lu_lambdas": (False, None), "use_flow_sigmas": (False, None), "euler_at_final": (False,),
        "lower_order_final": (True,), "variance_type": (None,),
    },
    "EulerDiscreteScheduler": {"interpolation_type": ("linear",), "timestep_type": ("discrete",)},
    "DDPMScheduler": {"variance_type": ("fixed_small",)},
    "PNDMScheduler": {"skip_prk_steps": (True,)},
}  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """What a scheduler config says."""

    process: Process
    parameterisation: Parameterisation
    sampler: str
    spacing: str
    rules: SpacingRules


def read_scheduler(json: Mapping[str, Any]) -> Schedule:
    """Interpret `scheduler/scheduler_config.json`.

    Raises:
        CheckpointError: a class or value that cannot be reproduced; the message names it.
    """
    load_all()
    name = str(json.get("_class_name", "PNDMScheduler"))
    if name not in SAMPLERS:
        raise CheckpointError(f"scheduler_config.json: class {name} is not known; known: {_known_classes()}")
    _refuse(json, name)
    process = _process(json)
    spacing = str(json.get("timestep_spacing", SPACING_OF_CLASS.get(name, "linspace")))
    if spacing not in TIMESTEP_SPACINGS:
        raise CheckpointError(
            f"scheduler_config.json: timestep_spacing is {spacing!r}, not one of {list(TIMESTEP_SPACINGS)}"
        )
    rules = SpacingRules(
        steps_offset=int(_number(json, "steps_offset", 0)),
        final_sigma=_final_sigma(json, name, process),
        base=spacing,
    )
    if json.get("use_karras_sigmas"):
        spacing = "karras"
    elif json.get("use_exponential_sigmas"):
        spacing = "exponential"
    return Schedule(process, _parameterisation(json), SAMPLERS.name(name), spacing, rules)


def _number(json: Mapping[str, Any], key: str, default: float) -> float:
    value = json.get(key, default)
    if type(value) not in (int, float) or not 0 <= value <= MOST:
        raise CheckpointError(f"scheduler_config.json: {key} is {value!r}; expected a number from 0 to {MOST:,}")
    return float(value)


def _known_classes() -> str:
    return ", ".join(filter(None, (SAMPLERS[name].diffusers for name in SAMPLERS)))


def _refuse(json: Mapping[str, Any], name: str) -> None:
    # Configs carry stray keys of the class they were converted from, so a key counts for its own class alone.
    for key, fine in (REFUSED[""] | REFUSED.get(name, {})).items():
        if key in json and json[key] not in fine:
            raise CheckpointError(f"scheduler_config.json: {name} with {key} = {json[key]!r} is not supported")
    if name == "PNDMScheduler" and "skip_prk_steps" not in json:
        raise CheckpointError("scheduler_config.json: PNDMScheduler without skip_prk_steps = true is not supported")
    # Default is True in DDIM and DDPM; every Stable Diffusion folder says False, because latents are not in [-1, 1].
    if json.get("clip_sample", name in {"DDIMScheduler", "DDPMScheduler"}):
        raise CheckpointError(
            "scheduler_config.json: clip_sample is true (or absent, which means true); set it to false"
        )


def _process(json: Mapping[str, Any]) -> Process:
    schedule = str(json.get("beta_schedule", "linear"))
    if schedule not in NOISE_SCHEDULES:
        raise CheckpointError(
            f"scheduler_config.json: beta_schedule {schedule!r} is not one of {list(NOISE_SCHEDULES)}"
        )
    betas = NOISE_SCHEDULES[schedule](
        int(_number(json, "num_train_timesteps", 1000)),
        _number(json, "beta_start", 0.0001),
        _number(json, "beta_end", 0.02),
    )
    if json.get("rescale_betas_zero_snr", False):
        betas = rescale_zero_terminal_snr(betas)
    return Process(betas)


def _final_sigma(json: Mapping[str, Any], name: str, process: Process) -> float:
    if name in {"DDIMScheduler", "PNDMScheduler"}:
        to_zero = json.get("set_alpha_to_one", name == "DDIMScheduler")
        return 0.0 if to_zero else process.sigma_min
    return process.sigma_min if json.get("final_sigmas_type", "zero") == "sigma_min" else 0.0


def _parameterisation(json: Mapping[str, Any]) -> Parameterisation:
    kind = str(json.get("prediction_type", "epsilon"))
    if kind not in PARAMETERISATIONS:
        raise CheckpointError(
            f"scheduler_config.json: prediction_type {kind!r} is not one of {list(PARAMETERISATIONS)}"
        )
    return PARAMETERISATIONS[kind]
