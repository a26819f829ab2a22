"""Scheduler configs of diffusers: every class, its defaults, stray keys, and the line for what cannot be reproduced.

The sigmas that come out of a config are those that the class of diffusers visits. Whether the samplers step as the
classes do is in tests/parity.
"""

import math
from typing import Any

import pytest
import torch

from reverie.diffusion.process import EdmProcess, FlowProcess, Process
from reverie.diffusion.spacing import TIMESTEP_SPACINGS, space
from reverie.errors import CheckpointError
from reverie.families.scheduler import CLASSES, SD1_SCHEDULER, UNSUITED, Schedule, read_scheduler
from reverie.sampling.presets import PRESETS, visited
from reverie.sampling.registry import load_all
from tests.tiny import diffusers, scheduler_of

# diffusers' KDPM2 classes hand torch tensors to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# What a folder that was converted from class to class carries.
STRAY: dict[str, Any] = {
    "use_karras_sigmas": True, "timestep_spacing": "trailing", "final_sigmas_type": "sigma_min", "thresholding": True,
    "set_alpha_to_one": False, "rescale_betas_zero_snr": True, "variance_type": "learned", "shift": 5.0,
    "original_inference_steps": 25, "sigma_data": 0.7, "interpolation_type": "log_linear", "use_flow_sigmas": True,
    "stochastic_sampling": True, "algorithm_type": "dpmsolver", "solver_order": 3, "tau_func": "none of ours",
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
}
SLOW = ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"]  # they look up timesteps one by one: a second each
QUICK = [name for name in CLASSES if name not in SLOW]
FLOAT32 = 1e-4  # betas, products and fifth powers in float32; sigma, not its logarithm, between whole timesteps


def config(name: str, **settings: Any) -> dict[str, Any]:
    betas = BETAS if "beta_start" in CLASSES[name].settings else {}
    return {"_class_name": name, **betas, **NEEDED.get(name, {}), **settings}


def sigmas_of(schedule: Schedule, n: int) -> torch.Tensor:
    return visited(
        PRESETS["diffusers"], schedule.sampler, schedule.spacing, n, schedule.process, schedule.rules,
        **schedule.spacing_options,
    )  # fmt: skip


def oracle(json: dict[str, Any], n: int) -> torch.Tensor:
    """The sigmas that diffusers visits, each once."""
    scheduler = scheduler_of(json)
    scheduler.set_timesteps(n)
    if not hasattr(scheduler, "sigmas") or json["_class_name"] in {"LCMScheduler", "TCDScheduler"}:
        table: torch.Tensor = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
        visits = torch.unique_consecutive(scheduler.timesteps)
        return table[visits].double()
    kept: torch.Tensor = scheduler.sigmas.double()
    return torch.cat([torch.unique_consecutive(kept[kept > kept[-1]]), kept[-1:]])


@pytest.mark.parametrize("name", list(CLASSES))
def test_settings_and_defaults_are_those_of_the_class(name: str) -> None:
    theirs = dict(getattr(diffusers, name)().config)
    for key, default in CLASSES[name].settings.items():
        assert key in theirs, key
        assert theirs[key] == default or (theirs[key], default) == (None, False), key


@pytest.mark.parametrize(
    ("name", "n"), [(name, n) for name in QUICK for n in (1, 2, 5, 20)] + [(name, 5) for name in SLOW]
)
def test_sigmas_of_a_plain_config(name: str, n: int) -> None:
    json = config(name)
    schedule = read_scheduler(json)
    assert schedule.sampler in load_all()
    want = oracle(json, n)
    got = sigmas_of(schedule, n)
    assert len(got) == n + 1
    torch.testing.assert_close(got[: len(want)], want, rtol=FLOAT32, atol=1e-6)


@pytest.mark.parametrize("name", list(CLASSES))
def test_stray_keys_change_nothing(name: str) -> None:
    stray = {key: value for key, value in STRAY.items() if key not in CLASSES[name].settings}
    plain, strayed = read_scheduler(config(name)), read_scheduler(config(name, **stray))
    assert (plain.sampler, plain.spacing, plain.rules) == (strayed.sampler, strayed.spacing, strayed.rules)
    assert (plain.sampler_options, plain.spacing_options) == (strayed.sampler_options, strayed.spacing_options)
    assert torch.equal(plain.process.sigmas, strayed.process.sigmas)


RANGED = [name for name in QUICK if "use_karras_sigmas" in CLASSES[name].settings]


@pytest.mark.parametrize("name", RANGED)
@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
def test_sigmas_of_the_flags(name: str, kind: str) -> None:
    json = config(name, **{f"use_{kind}_sigmas": True})
    schedule = read_scheduler(json)
    assert schedule.spacing == kind
    torch.testing.assert_close(sigmas_of(schedule, 12)[:-1], oracle(json, 12)[:12], rtol=FLOAT32, atol=1e-6)


SPACED = [name for name in QUICK if "timestep_spacing" in CLASSES[name].settings]


@pytest.mark.parametrize("name", SPACED)
@pytest.mark.parametrize("base", TIMESTEP_SPACINGS)
def test_sigmas_of_the_timestep_spacings(name: str, base: str) -> None:
    json = config(name, timestep_spacing=base, steps_offset=1)
    schedule = read_scheduler(json)
    assert (schedule.spacing, schedule.rules.steps_offset) == (base, 1)
    torch.testing.assert_close(sigmas_of(schedule, 12)[:12], oracle(json, 12)[:12], rtol=FLOAT32, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "sampler", "options"),
    [
        ({}, "dpmpp_2m", {}),
        ({"solver_type": "bh2", "algorithm_type": "deis"}, "dpmpp_2m", {}),
        ({"solver_order": 3}, "dpmpp_3m", {"order": 3}),
        ({"solver_type": "heun"}, "dpmpp_3m", {"order": 2, "solver_type": "heun"}),
        ({"lower_order_final": False}, "dpmpp_3m", {"order": 2, "lower_order_final": False}),
        ({"euler_at_final": True}, "dpmpp_3m", {"order": 2, "euler_at_final": True}),
        ({"algorithm_type": "sde-dpmsolver++"}, "dpmpp_3m", {"order": 2, "eta": 1.0}),
        ({"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, "dpm_solver", {"order": 2}),
    ],
    ids=str,
)
def test_dpm_solvers(settings: dict[str, Any], sampler: str, options: dict[str, Any]) -> None:
    schedule = read_scheduler(config("DPMSolverMultistepScheduler", **settings))
    assert schedule.sampler == sampler
    assert options.items() <= schedule.sampler_options.items()


@pytest.mark.parametrize("name", list(CLASSES))
def test_samplers_have_the_options_they_are_given(name: str) -> None:
    schedule = read_scheduler(config(name))
    assert set(schedule.sampler_options) <= set(load_all()[schedule.sampler].options)
    space(schedule.spacing, 3, schedule.process, schedule.rules, **schedule.spacing_options)


def test_other_samplers_options() -> None:
    unipc = read_scheduler(config("UniPCMultistepScheduler", solver_order=3, solver_type="bh1"))
    assert unipc.sampler_options == {"order": 3, "variant": "bh1", "lower_order_final": True}
    sa = read_scheduler(config("SASolverScheduler", predictor_order=3, corrector_order=4))
    assert sa.sampler_options == {"predictor_order": 3, "corrector_order": 4, "lower_order_final": True}
    lcm = read_scheduler(config("LCMScheduler", original_inference_steps=100))
    assert (lcm.spacing, lcm.spacing_options) == ("lcm", {"original_steps": 100})
    single = read_scheduler(config("DPMSolverSinglestepScheduler", algorithm_type="sde-dpmsolver++"))
    assert (single.sampler, single.sampler_options["eta"]) == ("dpmpp_2s", 1.0)


def test_the_range_of_karras_can_be_set() -> None:
    schedule = read_scheduler(config("EulerDiscreteScheduler", use_karras_sigmas=True, sigma_min=0.1, sigma_max=10.0))
    assert schedule.spacing_options == {"sigma_min": 0.1, "sigma_max": 10.0}


def test_processes() -> None:
    flow = read_scheduler(config("FlowMatchEulerDiscreteScheduler", shift=3.0)).process
    assert isinstance(flow, FlowProcess)
    assert flow.shift == 3.0
    dpm = read_scheduler(
        config("DPMSolverMultistepScheduler", use_flow_sigmas=True, flow_shift=2.0, prediction_type="flow_prediction")
    )
    assert isinstance(dpm.process, FlowProcess)
    assert (dpm.process.shift, dpm.spacing, dpm.parameterisation.name) == (2.0, "flow_sigmas", "flow_prediction")
    playground = read_scheduler(config("EDMDPMSolverMultistepScheduler"))
    assert isinstance(playground.process, EdmProcess)
    assert (playground.process.sigma_data, playground.spacing) == (0.5, "karras")
    assert playground.parameterisation.at(0.5).out > 0
    cosxl = read_scheduler(config("EDMEulerScheduler", prediction_type="v_prediction", sigma_schedule="exponential"))
    assert (cosxl.spacing, cosxl.spacing_options) == ("exponential", {})
    assert cosxl.parameterisation.at(0.5).out < 0


def test_trained_betas_are_a_table() -> None:
    betas = torch.linspace(0.001, 0.02, 1000, dtype=torch.float64)
    process = read_scheduler(config("DDIMScheduler", trained_betas=betas.tolist())).process
    assert isinstance(process, Process)
    assert torch.equal(process.betas, betas)


def test_the_default_of_stable_diffusion_1() -> None:
    schedule = read_scheduler(SD1_SCHEDULER)
    assert (schedule.sampler, schedule.spacing, schedule.rules.steps_offset) == ("pndm", "leading", 1)
    assert schedule.rules.final_sigma == schedule.process.sigma_min


@pytest.mark.parametrize("name", list(UNSUITED))
def test_classes_that_are_for_something_else(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"class {name} is not supported: .*use "):
        read_scheduler({"_class_name": name})


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("AmusedScheduler", {}, "class AmusedScheduler is not known; known: DDIMScheduler, "),
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample is true (or absent, which means true)"),
        ("DDIMScheduler", {"thresholding": True}, "DDIMScheduler with thresholding = True is not supported"),
        ("DDPMScheduler", {"variance_type": "learned"}, "with variance_type = 'learned' is not supported"),
        ("PNDMScheduler", {"skip_prk_steps": False}, "with skip_prk_steps = False is not supported"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type = 'continuous' is not supported"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "even"}, "timestep_spacing is 'even', not one of"),
        ("EulerDiscreteScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not one of"),
        ("EulerDiscreteScheduler", {"prediction_type": "flow_prediction"}, "'flow_prediction' is not one of"),
        ("EulerDiscreteScheduler", {"beta_start": "low"}, "beta_start is 'low'; expected a number from 0"),
        ("EulerDiscreteScheduler", {"beta_start": 0}, "the betas run from 0 to 0.012; all must be between 0 and 1"),
        ("EulerDiscreteScheduler", {"beta_end": 3.0}, "all must be between 0 and 1"),
        ("EulerDiscreteScheduler", {"num_train_timesteps": 1}, "expected a whole number of at least 2"),
        ("EulerDiscreteScheduler", {"steps_offset": 0.5}, "steps_offset is 0.5; expected a whole number"),
        ("EulerDiscreteScheduler", {"trained_betas": [0.1]}, "trained_betas must be a list of 1000 numbers"),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "one"}, "final_sigmas_type 'one' is not one of"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of them can be"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver"}, "algorithm_type = 'sde-dpmsolver'"),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "lambda_min_clipped = -5.1"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas with prediction_type 'epsilon'"),
        ("UniPCMultistepScheduler", {"disable_corrector": [0]}, "disable_corrector = [0]"),
        ("DEISMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas = True"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 0}, "shift is 0; expected a number above 0"),
        ("EDMEulerScheduler", {"sigma_min": 90}, "sigma_min is 90, sigma_max 80 and sigma_data 0.5"),
        ("LCMScheduler", {"original_inference_steps": 0}, "expected a whole number of at least 1"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_reproduced(name: str, settings: dict[str, Any], said: str) -> None:
    json = {"_class_name": name} if name not in CLASSES else config(name)
    with pytest.raises(CheckpointError) as caught:
        read_scheduler(json | settings)
    assert said in str(caught.value)
    assert str(caught.value).startswith("scheduler_config.json: ")


def test_a_default_that_cannot_be_reproduced_says_so() -> None:
    with pytest.raises(CheckpointError, match="skip_prk_steps = False, which it is where absent, is not supported"):
        read_scheduler({"_class_name": "PNDMScheduler"})


def test_minus_infinity_as_json_has_it_is_the_default() -> None:
    assert read_scheduler(config("DPMSolverMultistepScheduler", lambda_min_clipped=-math.inf)).sampler == "dpmpp_2m"
