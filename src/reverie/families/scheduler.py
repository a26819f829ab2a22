"""A diffusers scheduler config becomes the model's process, parameterisation and defaults."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reverie.diffusion.parameterisation import PARAMETERISATIONS, Edm, Parameterisation
from reverie.diffusion.process import (
    NOISE_SCHEDULES,
    AnyProcess,
    EdmProcess,
    FlowProcess,
    Process,
    rescale_zero_terminal_snr,
)
from reverie.diffusion.spacing import TIMESTEP_SPACINGS, SpacingRules
from reverie.errors import CheckpointError
from reverie.sampling.names import resolve

# The scheduler of runwayml's and CompVis' Stable Diffusion 1 folders: what a file without a config gets.
SD1_SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "timestep_spacing": "leading", "prediction_type": "epsilon",
}  # fmt: skip

MOST = 100_000  # of any number in a scheduler config; the largest that is used is 1,000 training timesteps
OFF = (False, None)
ON = (True,)

# Groups of settings that several classes have, with diffusers' own defaults.
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
         "trained_betas": None, "prediction_type": "epsilon"}  # fmt: skip
LATENT = BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
SPACED = {"timestep_spacing": "linspace", "steps_offset": 0}
LEADING = SPACED | {"timestep_spacing": "leading"}
RANGES = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
FLAGS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta",
         "use_lu_lambdas": "lu_lambdas", "use_flow_sigmas": "flow_sigmas"}  # fmt: skip
ENDS = {"final_sigmas_type": "zero"}
ALPHA = {"set_alpha_to_one": True}
ZERO_SNR = {"rescale_betas_zero_snr": False}
CLIP = {"clip_sample": False}
CLIPPED = {"clip_sample": True}  # the default of DDIM and DDPM; every latent model says False
THRESHOLD = {"thresholding": False}
LIMITS = {"sigma_min": None, "sigma_max": None}
FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0}
DYNAMIC = {"use_dynamic_shifting": False}
SOLVER = {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True}
CLIPPING = {"lambda_min_clipped": -math.inf, "variance_type": None}
DISTILLED = {"original_inference_steps": 50, "timestep_scaling": 10.0}
EDM = {"num_train_timesteps": 1000, "prediction_type": "epsilon", "sigma_min": 0.002, "sigma_max": 80.0,
       "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0} | ENDS  # fmt: skip
MATCHED = {"num_train_timesteps": 1000, "shift": 1.0}  # flow matching
SHIFTED = DYNAMIC | {"invert_sigmas": False, "shift_terminal": None}

Values = Mapping[str, tuple[object, ...]]


@dataclass(frozen=True)
class SchedulerClass:
    """What a class of diffusers reads from its config; a key counts for the classes that have it, the rest is stray.

    Attributes:
        settings: every setting that decides a picture, with the class's default.
        only: settings of which other values cannot be reproduced.
        final: where the last step ends: at `zero`, at the `smallest` trained sigma, or as a setting says.
        whole_range: karras and the like span all trained sigmas, not those of the timestep spacing.
    """

    settings: Mapping[str, Any]
    only: Values = field(default_factory=dict)
    final: str = "zero"
    whole_range: bool = False


EVERYWHERE: Values = {
    "thresholding": OFF, "variance_type": (None,), "lambda_min_clipped": (-math.inf, None),
    "use_dynamic_shifting": OFF, "shift_terminal": (None,), "invert_sigmas": OFF,
}  # fmt: skip
SOLVER_TYPES = ("midpoint", "heun", "logrho", "bh1", "bh2")  # each class takes its default for those of other classes
DPM = {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"), "solver_type": SOLVER_TYPES,
       "solver_order": (1, 2, 3)}  # fmt: skip

CLASSES: dict[str, SchedulerClass] = {
    "DDIMScheduler": SchedulerClass(BETAS | LEADING | ALPHA | ZERO_SNR | CLIPPED | THRESHOLD, final="set_alpha_to_one"),
    "DDPMScheduler": SchedulerClass(
        BETAS | LEADING | ZERO_SNR | CLIPPED | THRESHOLD | {"variance_type": "fixed_small"},
        {"variance_type": ("fixed_small",)},
    ),
    "PNDMScheduler": SchedulerClass(
        BETAS | LEADING | {"set_alpha_to_one": False, "skip_prk_steps": False},
        {"skip_prk_steps": ON}, final="set_alpha_to_one",
    ),
    "LMSDiscreteScheduler": SchedulerClass(BETAS | SPACED | RANGES),
    "EulerDiscreteScheduler": SchedulerClass(
        BETAS | SPACED | RANGES | ZERO_SNR | ENDS | LIMITS
        | {"interpolation_type": "linear", "timestep_type": "discrete"},
        {"interpolation_type": ("linear",), "timestep_type": ("discrete",)}, final="final_sigmas_type",
    ),
    "EulerAncestralDiscreteScheduler": SchedulerClass(BETAS | SPACED | ZERO_SNR),
    "HeunDiscreteScheduler": SchedulerClass(LATENT | SPACED | RANGES | CLIP),
    "KDPM2DiscreteScheduler": SchedulerClass(LATENT | SPACED | RANGES),
    "KDPM2AncestralDiscreteScheduler": SchedulerClass(LATENT | SPACED | RANGES),
    "DPMSolverMultistepScheduler": SchedulerClass(
        BETAS | SPACED | RANGES | ZERO_SNR | ENDS | THRESHOLD | FLOW | DYNAMIC | SOLVER | CLIPPING
        | {"euler_at_final": False, "use_lu_lambdas": False},
        DPM | {"algorithm_type": (*DPM["algorithm_type"], "dpmsolver")}, final="final_sigmas_type", whole_range=True,
    ),
    "DPMSolverSinglestepScheduler": SchedulerClass(
        BETAS | RANGES | ENDS | THRESHOLD | FLOW | DYNAMIC | SOLVER | CLIPPING | {"lower_order_final": False},
        DPM, final="final_sigmas_type", whole_range=True,
    ),
    "DPMSolverSDEScheduler": SchedulerClass(LATENT | SPACED | RANGES),
    "UniPCMultistepScheduler": SchedulerClass(
        BETAS | SPACED | RANGES | ZERO_SNR | ENDS | THRESHOLD | FLOW | DYNAMIC | LIMITS
        | {"solver_order": 2, "solver_type": "bh2", "lower_order_final": True, "predict_x0": True,
           "disable_corrector": [], "solver_p": None, "shift_terminal": None},
        {"solver_order": (1, 2, 3), "solver_type": SOLVER_TYPES, "predict_x0": ON, "disable_corrector": ([], None),
         "solver_p": (None,)},
        final="final_sigmas_type", whole_range=True,
    ),
    "DEISMultistepScheduler": SchedulerClass(
        BETAS | SPACED | RANGES | THRESHOLD | FLOW | DYNAMIC | {"solver_order": 2, "lower_order_final": True},
        {"solver_order": (1, 2, 3), "use_flow_sigmas": OFF}, final="smallest", whole_range=True,
    ),
    "SASolverScheduler": SchedulerClass(
        BETAS | SPACED | RANGES | THRESHOLD | FLOW | CLIPPING
        | {"predictor_order": 2, "corrector_order": 2, "lower_order_final": True, "tau_func": None,
           "algorithm_type": "data_prediction"},
        {"algorithm_type": ("data_prediction",), "tau_func": (None,), "use_flow_sigmas": OFF,
         "predictor_order": (1, 2, 3, 4), "corrector_order": (1, 2, 3, 4)},
        final="smallest", whole_range=True,
    ),
    "LCMScheduler": SchedulerClass(
        LATENT | ZERO_SNR | CLIP | THRESHOLD | DISTILLED | {"beta_schedule": "scaled_linear"}
    ),
    "TCDScheduler": SchedulerClass(
        LATENT | ZERO_SNR | CLIP | THRESHOLD | DISTILLED | {"beta_schedule": "scaled_linear"}, final="smallest"
    ),
    "EDMEulerScheduler": SchedulerClass(EDM, final="final_sigmas_type"),
    "EDMDPMSolverMultistepScheduler": SchedulerClass(
        EDM | THRESHOLD | SOLVER | {"euler_at_final": False},
        DPM, final="final_sigmas_type",
    ),
    "FlowMatchEulerDiscreteScheduler": SchedulerClass(
        MATCHED | SHIFTED | RANGES | {"stochastic_sampling": False}, {"stochastic_sampling": OFF}
    ),
    "FlowMatchHeunDiscreteScheduler": SchedulerClass(MATCHED),
    "FlowMatchLCMScheduler": SchedulerClass(
        MATCHED | SHIFTED | RANGES | {"scale_factors": None}, {"scale_factors": (None,)}
    ),
}  # fmt: skip

# Classes that are known but cannot be reproduced, and why.
UNSUITED = {
    "IPNDMScheduler": "its noise schedule is that of audio models; use DPMSolverMultistepScheduler",
    "CosineDPMSolverMultistepScheduler": "it is for audio models; use EDMDPMSolverMultistepScheduler",
    "DDIMInverseScheduler": "it goes from a picture to noise; use DDIMScheduler",
    "DPMSolverMultistepInverseScheduler": "it goes from a picture to noise; use DPMSolverMultistepScheduler",
}


@dataclass(frozen=True)
class Schedule:
    """What a scheduler config says.

    Attributes:
        sampler_options, spacing_options: settings other than our defaults.
    """

    process: AnyProcess
    parameterisation: Parameterisation
    sampler: str
    spacing: str
    rules: SpacingRules
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    spacing_options: Mapping[str, float] = field(default_factory=dict)


def read_scheduler(json: Mapping[str, Any]) -> Schedule:
    """Interpret `scheduler/scheduler_config.json`.

    Raises:
        CheckpointError: a class or value that cannot be reproduced; the message names it.
    """
    name = str(json.get("_class_name", "PNDMScheduler"))
    if name in UNSUITED:
        raise _error(f"class {name} is not supported: {UNSUITED[name]}")
    if name not in CLASSES:
        raise _error(f"class {name} is not known; known: {', '.join(CLASSES)}")
    known = CLASSES[name]
    settings = {key: json.get(key, default) for key, default in known.settings.items()}
    _refuse(name, known, settings, json)
    process, parameterisation = _model(settings)
    base = _base(settings)
    spacing, spacing_options = _spacing(name, settings, base)
    sampler, sampler_options = _sampler(name, settings)
    rules = SpacingRules(
        steps_offset=_whole(settings, "steps_offset", 0) if "steps_offset" in settings else 0,
        final_sigma=_final_sigma(known, settings, process),
        base="linspace" if known.whole_range and spacing not in TIMESTEP_SPACINGS else base,
    )
    return Schedule(process, parameterisation, sampler, spacing, rules, sampler_options, spacing_options)


def noising(json: Mapping[str, Any]) -> Process:
    """The noise process of a config by which noise is only added: how its class would take it away does not matter.

    Raises:
        CheckpointError: betas that cannot be.
    """
    settings = {key: json.get(key, default) for key, default in BETAS.items()}
    return Process(_betas(settings, _whole(settings, "num_train_timesteps", 2)))


def _error(text: str) -> CheckpointError:
    return CheckpointError(f"scheduler_config.json: {text}")


def _number(settings: Mapping[str, Any], key: str) -> float:
    value = settings[key]
    if type(value) not in (int, float) or not 0 <= value <= MOST:
        raise _error(f"{key} is {value!r}; expected a number from 0 to {MOST:,}")
    return float(value)


def _whole(settings: Mapping[str, Any], key: str, least: int) -> int:
    value = _number(settings, key)
    if value != int(value) or value < least:
        raise _error(f"{key} is {settings[key]!r}; expected a whole number of at least {least}")
    return int(value)


def _one_of(settings: Mapping[str, Any], key: str, known: Sequence[str]) -> str:
    value = settings[key]
    if value not in known:
        raise _error(f"{key} {value!r} is not one of {list(known)}")
    return str(value)


def _refuse(name: str, known: SchedulerClass, settings: Mapping[str, Any], json: Mapping[str, Any]) -> None:
    for key, fine in (dict(EVERYWHERE) | dict(known.only)).items():
        if key in settings and settings[key] not in fine:
            absent = "" if key in json else ", which it is where absent,"
            raise _error(f"{name} with {key} = {settings[key]!r}{absent} is not supported")
    if settings.get("clip_sample"):  # latents are not in [-1, 1]
        raise _error("clip_sample is true (or absent, which means true); set it to false")
    chosen = [key for key in FLAGS if settings.get(key)]
    if len(chosen) > 1:
        raise _error(f"{' and '.join(chosen)} are both true; only one of them can be")


def _model(settings: Mapping[str, Any]) -> tuple[AnyProcess, Parameterisation]:
    """The noise process, and what the network says."""
    steps = _whole(settings, "num_train_timesteps", 2)
    if "sigma_data" in settings:
        return _edm(settings, steps)
    if "shift" in settings or settings.get("use_flow_sigmas"):
        return _flow(settings, steps), PARAMETERISATIONS["flow_prediction"]
    predictions = [kind for kind in PARAMETERISATIONS if kind != "flow_prediction"]
    return Process(_betas(settings, steps)), PARAMETERISATIONS[_one_of(settings, "prediction_type", predictions)]


def _edm(settings: Mapping[str, Any], steps: int) -> tuple[EdmProcess, Edm]:
    low, high, data = (_number(settings, key) for key in ("sigma_min", "sigma_max", "sigma_data"))
    if not 0 < low < high or data == 0:
        raise _error(
            f"sigma_min is {low:g}, sigma_max {high:g} and sigma_data {data:g}; expected 0 < min < max, data > 0"
        )
    v = _one_of(settings, "prediction_type", ("epsilon", "v_prediction")) == "v_prediction"
    return EdmProcess(low, high, data, steps), Edm(data, v=v)


def _flow(settings: Mapping[str, Any], steps: int) -> FlowProcess:
    said = settings.get("prediction_type", "flow_prediction")
    if said != "flow_prediction":
        raise _error(f"use_flow_sigmas with prediction_type {said!r} is not supported; expected 'flow_prediction'")
    key = "shift" if "shift" in settings else "flow_shift"
    shift = _number(settings, key)
    if shift == 0:
        raise _error(f"{key} is 0; expected a number above 0, 1 for no shift")
    return FlowProcess(steps, shift)


def _betas(settings: Mapping[str, Any], steps: int) -> Tensor:
    trained = settings["trained_betas"]
    if trained is None:
        schedule = NOISE_SCHEDULES[_one_of(settings, "beta_schedule", [*NOISE_SCHEDULES, "squaredcos_cap_v2"])]
        betas = schedule(steps, _number(settings, "beta_start"), _number(settings, "beta_end"))
    elif isinstance(trained, list) and len(trained) == steps and all(type(b) in (int, float) for b in trained):
        betas = torch.tensor(trained, dtype=torch.float64)
    else:
        raise _error(f"trained_betas must be a list of {steps} numbers, one for each of num_train_timesteps")
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise _error(f"the betas run from {float(betas[0]):g} to {float(betas[-1]):g}; all must be between 0 and 1")
    return rescale_zero_terminal_snr(betas) if settings.get("rescale_betas_zero_snr") else betas


def _base(settings: Mapping[str, Any]) -> str:
    """The timestep spacing; the class's only one where there is no choice."""
    spacing = settings.get("timestep_spacing", "linspace")
    if spacing not in TIMESTEP_SPACINGS:
        raise _error(f"timestep_spacing is {spacing!r}, not one of {list(TIMESTEP_SPACINGS)}")
    return str(spacing)


def _spacing(name: str, settings: Mapping[str, Any], base: str) -> tuple[str, dict[str, float]]:
    """The spacing and its options."""
    if "sigma_schedule" in settings:
        kind = _one_of(settings, "sigma_schedule", ("karras", "exponential"))
        return kind, {"rho": _number(settings, "rho")} if kind == "karras" else {}
    if "original_inference_steps" in settings:
        return "lcm", {"original_steps": _whole(settings, "original_inference_steps", 1)}
    flag = next((key for key in FLAGS if settings.get(key)), None)
    if flag in RANGES:
        return FLAGS[flag], {key: _number(settings, key) for key in LIMITS if settings.get(key) is not None}
    if flag == "use_flow_sigmas" and name == "UniPCMultistepScheduler":
        return "flow_sigmas_unipc", {}
    return FLAGS[flag] if flag else ("uniform" if "shift" in settings else base), {}


def _final_sigma(known: SchedulerClass, settings: Mapping[str, Any], process: AnyProcess) -> float:
    if known.final == "set_alpha_to_one":
        return 0.0 if settings["set_alpha_to_one"] else process.sigma_min
    if known.final == "final_sigmas_type":
        kind = _one_of(settings, "final_sigmas_type", ("zero", "sigma_min"))
        if kind == "sigma_min" and isinstance(process, FlowProcess):
            raise _error("final_sigmas_type 'sigma_min' with use_flow_sigmas is not supported; expected 'zero'")
        return 0.0 if kind == "zero" else process.sigma_min
    return process.sigma_min if known.final == "smallest" else 0.0


def _sampler(name: str, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The sampler, and its options where they are not its defaults."""
    sampler = resolve(name)[0]
    if "algorithm_type" in settings and sampler != "sa_solver":
        return _dpm_solver(sampler, settings)
    options: dict[str, Any] = {}
    if sampler == "unipc":
        options = {"order": settings["solver_order"], "lower_order_final": settings["lower_order_final"],
                   "variant": "bh1" if settings["solver_type"] == "bh1" else "bh2"}  # fmt: skip
    elif sampler == "deis":
        options = {"order": settings["solver_order"], "lower_order_final": _few(settings)}
    elif sampler == "sa_solver":
        options = {key: settings[key] for key in ("predictor_order", "corrector_order", "lower_order_final")}
    elif sampler == "lcm" and "timestep_scaling" in settings:
        options = {"timestep_scaling": _number(settings, "timestep_scaling")}
    return sampler, options


def _dpm_solver(sampler: str, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    heun = settings["solver_type"] == "heun"
    options = {"order": settings["solver_order"], "solver_type": "heun" if heun else "midpoint"}
    kind = settings["algorithm_type"].replace("deis", "dpmsolver++")
    if sampler == "dpmpp_2s":
        options["lower_order_final"] = bool(settings["lower_order_final"])
    else:
        options["lower_order_final"], options["euler_at_final"] = _few(settings), bool(settings["euler_at_final"])
        plain = options == {"order": 2, "solver_type": "midpoint", "lower_order_final": None, "euler_at_final": False}
        if plain and kind == "dpmsolver++":
            return "dpmpp_2m", {}
        sampler = "dpm_solver" if kind == "dpmsolver" else "dpmpp_3m"
    return sampler, options | ({"eta": 1.0} if kind.startswith("sde") else {})


def _few(settings: Mapping[str, Any]) -> bool | None:
    """Lower orders at the end: None where there are few steps, False never."""
    return None if settings["lower_order_final"] else False
