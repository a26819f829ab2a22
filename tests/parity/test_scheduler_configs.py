"""A scheduler config is read so that the whole path comes out as with the class of diffusers that wrote it.

The network is exact for a mixture of Gaussians and hears the timestep that it is told, rounded or not. Compared are
the last samples, relative to their largest value; diffusers computes sigmas and coefficients in float32.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reverie.diffusion.process import FlowProcess
from reverie.diffusion.spacing import TIMESTEP_SPACINGS
from reverie.families.scheduler import CLASSES, Schedule, read_scheduler
from reverie.sampling.presets import PRESETS, told_timestep, visited
from reverie.sampling.registry import load_all
from tests.sampling.mixture import denoise, denoise_flow
from tests.tiny import diffusers

# diffusers' KDPM2 classes hand torch tensors to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")

TOLERANCE = 2e-4  # the largest is 8e-5, of DEIS with order 3; most are near 1e-6
PRESET = PRESETS["diffusers"]
SHAPE = (1, 4, 6, 6)
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALWAYS: dict[str, Any] = {"clip_sample": False, "skip_prk_steps": True, "set_alpha_to_one": False, **BETAS}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sigma_min": {"final_sigmas_type": "sigma_min"},
    "v": {"prediction_type": "v_prediction"},
    "order 3": {"solver_order": 3},
    "heun": {"solver_type": "heun"},
    "sde": {"algorithm_type": "sde-dpmsolver++"},
    "shift": {"shift": 3.0},
    "flow": {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    "edm exponential": {"sigma_schedule": "exponential"},
}
NOT_HERE = {"DPMSolverSDEScheduler", "FlowMatchLCMScheduler"}  # their noise is from seeds of their own
# The class rounds the visited timesteps of Karras' sigmas, but not those between them; ours rounds neither.
LOOSE = {("KDPM2DiscreteScheduler", "karras"): 3e-3, ("KDPM2AncestralDiscreteScheduler", "karras"): 3e-3}


def cases() -> list[tuple[str, str]]:
    return [
        (name, kind)
        for name in CLASSES
        for kind, settings in SETTINGS.items()
        if name not in NOT_HERE and settings.keys() <= CLASSES[name].settings.keys() and possible(name, kind)
    ]


def possible(name: str, kind: str) -> bool:
    if kind == "flow":
        return name in {"DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DPMSolverSinglestepScheduler"}
    if name.startswith("KDPM2"):  # it looks up timesteps one by one, two seconds a path
        return kind in {"plain", "karras"}
    if kind == "v":
        return not name.startswith("EDM")
    return not (name == "SASolverScheduler" and kind == "sde") and not (
        name.startswith(("UniPC", "DEIS")) and kind == "heun"
    )


def network(schedule: Schedule) -> Callable[[Tensor, float], Tensor]:
    """`(scaled x, timestep) -> answer`, in terms of what the config says is predicted."""
    process = schedule.process
    flow = isinstance(process, FlowProcess)

    def answer(x: Tensor, timestep: float) -> Tensor:
        sigma = timestep / process.steps if flow else process.sigma(timestep)
        k = schedule.parameterisation.at(sigma)
        x = x / k.into
        return ((denoise_flow if flow else denoise)(x, sigma) - k.skip * x) / k.out

    return answer


def ours(schedule: Schedule, n: int, generator: torch.Generator) -> Tensor:
    sampler, process = load_all()[schedule.sampler], schedule.process
    net, told = network(schedule), told_timestep(PRESET, sampler, schedule.spacing, process)
    sigmas = visited(PRESET, schedule.sampler, schedule.spacing, n, process, schedule.rules, **schedule.spacing_options)

    def predict(x: Tensor, sigma: float) -> Tensor:
        k = schedule.parameterisation.at(sigma)
        return k.skip * x + k.out * net(k.into * x, told(process.timestep(sigma)))

    def noise(*_: float) -> Tensor:
        return torch.randn(SHAPE, generator=generator)

    first = float(sigmas[0])
    from_sigma = process.discrete and not sampler.unit_start and schedule.rules.base in {"linspace", "trailing"}
    options = dict(schedule.sampler_options)
    if sampler.fixed_stride and schedule.spacing in TIMESTEP_SPACINGS:
        options["stride"] = process.steps // n
    if sampler.name == "pndm":
        options["quantity"] = schedule.parameterisation.name
    x = noise() * (first if from_sigma else process.scale(first))
    out: Tensor = sampler.function(predict, x, sigmas, noise=noise, process=process, **options)
    return out / process.scale(float(sigmas[-1])) if sampler.unit_start and process.discrete else out


def theirs(json: dict[str, Any], schedule: Schedule, n: int, generator: torch.Generator) -> Tensor:
    kind = getattr(diffusers, json["_class_name"])
    known = inspect.signature(inspect.unwrap(kind.__init__)).parameters
    scheduler = kind(**{key: value for key, value in json.items() if key in known})
    scheduler.set_timesteps(n)
    takes = inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if "generator" in takes else {}
    net = network(schedule)
    x = torch.randn(SHAPE, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(net(scaled, float(t)), t, x, **extra).prev_sample
    return x


@pytest.mark.parametrize(("name", "kind"), cases())
def test_a_config_gives_the_path_of_its_class(name: str, kind: str) -> None:
    json = {"_class_name": name, **ALWAYS, **SETTINGS[kind]}
    if kind == "flow":
        del json["beta_start"], json["beta_end"], json["beta_schedule"]
    schedule = read_scheduler(json)
    for n in (3,) if name.startswith("KDPM2") else (3, 8):
        want = theirs(json, schedule, n, torch.Generator().manual_seed(5))
        got = ours(schedule, n, torch.Generator().manual_seed(5))
        assert math.isfinite(float(got.sum()))
        assert float((got - want).abs().max() / want.abs().max()) < LOOSE.get((name, kind), TOLERANCE), n
