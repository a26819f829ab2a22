"""diffusers' schedulers ask their network the same questions, step by step, and so come to the same sample.

Levels and timesteps are ours (`presets.visited`, `presets.told_timestep`), so that they are compared too. diffusers
keeps its levels in float32, and some classes x: the tolerances are float32's, as the denoisers magnify it.
"""

import inspect
import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from reverie.diffusion.process import AnyProcess, EdmProcess, FlowProcess, Process
from reverie.diffusion.spacing import TIMESTEP_SPACINGS, SpacingRules, space
from reverie.sampling.presets import PRESETS, told_timestep, visited
from reverie.sampling.registry import load_all
from reverie.types import Denoise
from tests import tiny
from tests.sampling import mixture
from tests.tiny import diffusers

# What diffusers warns of itself: its algorithm_type dpmsolver, and NumPy functions that it calls on tensors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`algorithm_types dpmsolver:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

SAMPLERS = load_all()
PRESET = PRESETS["diffusers"]
PROCESS = Process.named()
SHAPE = (2, 4, 4, 4)
Settings = dict[str, Any]
Answer = Callable[[Tensor, float, float], Tensor]
"""`(x in units of sigma, sigma, timestep) -> x0`."""

MULTISTEP, SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
UNIPC, DEIS, SA = "UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler"
AT_MINIMUM: Settings = {"final_sigmas_type": "sigma_min"}
SDE: Settings = {"algorithm_type": "sde-dpmsolver++"}
NOISE: Settings = {"algorithm_type": "dpmsolver"} | AT_MINIMUM
HEUN: Settings = {"solver_type": "heun"}
EXACT: Settings = {"lower_order_final": False}
LOWERED: Settings = {"lower_order_final": True}


def always(timestep: float) -> float:
    return 1.0


def never(timestep: float) -> float:
    return 0.0


# our sampler, their class, their settings, our options
CASES: list[tuple[str, str, Settings, Settings]] = [
    ("dpmpp_3m", MULTISTEP, {"solver_order": 1}, {"order": 1}),
    ("dpmpp_2m", MULTISTEP, {}, {}),
    ("dpmpp_2m", MULTISTEP, HEUN, HEUN),
    ("dpmpp_2m", MULTISTEP, AT_MINIMUM, {}),
    ("dpmpp_2m", MULTISTEP, AT_MINIMUM | EXACT, EXACT),
    ("dpmpp_2m", MULTISTEP, AT_MINIMUM | EXACT | {"euler_at_final": True}, EXACT | {"euler_at_final": True}),
    ("dpmpp_3m", MULTISTEP, {"solver_order": 3}, {}),
    ("dpmpp_3m", MULTISTEP, {"solver_order": 3} | HEUN | AT_MINIMUM, HEUN),
    ("dpmpp_3m", MULTISTEP, {"solver_order": 3} | AT_MINIMUM | EXACT, EXACT),
    ("dpmpp_3m", MULTISTEP, {"solver_order": 1} | SDE, {"order": 1, "eta": 1.0}),
    ("dpmpp_3m", MULTISTEP, SDE, {"order": 2, "eta": 1.0}),
    ("dpmpp_3m", MULTISTEP, SDE | HEUN | AT_MINIMUM, {"order": 2, "eta": 1.0} | HEUN),
    ("dpm_solver", MULTISTEP, {"solver_order": 1} | NOISE, {"order": 1}),
    ("dpm_solver", MULTISTEP, NOISE, {}),
    ("dpm_solver", MULTISTEP, NOISE | HEUN | EXACT, HEUN | EXACT),
    ("dpm_solver", MULTISTEP, {"solver_order": 3} | NOISE, {"order": 3}),
    ("dpmpp_2s", SINGLESTEP, {"solver_order": 1}, {"order": 1}),
    ("dpmpp_2s", SINGLESTEP, {}, {}),
    ("dpmpp_2s", SINGLESTEP, AT_MINIMUM | HEUN, HEUN),
    ("dpmpp_2s", SINGLESTEP, AT_MINIMUM | LOWERED, LOWERED),
    ("dpmpp_2s", SINGLESTEP, {"solver_order": 3}, {"order": 3}),
    ("dpmpp_2s", SINGLESTEP, {"solver_order": 3} | AT_MINIMUM | HEUN, {"order": 3} | HEUN),
    ("dpmpp_2s", SINGLESTEP, SDE, {"eta": 1.0}),
    ("dpmpp_2s", SINGLESTEP, {"solver_order": 3} | SDE, {"order": 3, "eta": 1.0}),
    ("unipc", UNIPC, {"solver_order": 1}, {"order": 1}),
    ("unipc", UNIPC, {}, {}),
    ("unipc", UNIPC, {"solver_order": 3}, {"order": 3}),
    ("unipc", UNIPC, {"solver_type": "bh1"} | AT_MINIMUM, {"variant": "bh1"}),  # to 0 theirs is infinity times 0
    ("unipc", UNIPC, {"solver_order": 3} | EXACT | AT_MINIMUM, {"order": 3} | EXACT),
    ("unipc", UNIPC, {"disable_corrector": [0, 2]}, {"disable_corrector": [0, 2]}),
    ("deis", DEIS, {"solver_order": 1}, {"order": 1}),
    ("deis", DEIS, {}, {}),
    ("deis", DEIS, {"solver_order": 3}, {"order": 3}),
    ("deis", DEIS, EXACT, EXACT),
    ("sa_solver", SA, {}, {}),
    ("sa_solver", SA, {"predictor_order": 1, "corrector_order": 1}, {"predictor_order": 1, "corrector_order": 1}),
    ("sa_solver", SA, {"predictor_order": 3, "corrector_order": 4}, {"predictor_order": 3, "corrector_order": 4}),
    ("sa_solver", SA, {"tau_func": always} | EXACT, {"tau_of": always} | EXACT),
    ("sa_solver", SA, {"tau_func": never}, {"tau": 0.0}),
    ("tcd", "TCDScheduler", {}, {}),
    ("tcd", "TCDScheduler", {"gamma": 0.0}, {"gamma": 0.0}),
    ("tcd", "TCDScheduler", {"gamma": 1.0, "original_inference_steps": 25}, {"gamma": 1.0}),
    ("lcm", "LCMScheduler", {}, {"timestep_scaling": 10.0}),
    ("ipndm", "IPNDMScheduler", {}, {"euler_at_final": False}),
    ("euler", "EulerDiscreteScheduler", {}, {}),
    ("euler_a", "EulerAncestralDiscreteScheduler", {}, {}),
    ("heun", "HeunDiscreteScheduler", {}, {}),
    ("lms", "LMSDiscreteScheduler", {}, {}),
    ("dpm_2", "KDPM2DiscreteScheduler", {}, {}),
    ("dpm_2_a", "KDPM2AncestralDiscreteScheduler", {}, {}),
    ("dpmpp_sde", "DPMSolverSDEScheduler", {}, {}),
    ("dpmpp_2m_sde", MULTISTEP, SDE, {}),
    ("dpmpp_2m_sde_heun", MULTISTEP, SDE | HEUN, {}),
]
RANGES = ("karras", "exponential", "beta")
DISTILLED = ("TCDScheduler", "LCMScheduler")  # they visit timesteps of their own
FROM_MINIMUM = (DEIS, SA, "TCDScheduler")  # they end at the smallest trained sigma, whatever the config says
OWN_X = ("Euler", "Heun", "LMS", "KDPM2", "DPMSolverSDE")  # classes that keep x in units of sigma


def spacings(case: int) -> list[str]:
    """What the class can be told to visit."""
    sampler, name, settings, _ = CASES[case]
    if name in DISTILLED:
        return ["lcm"]
    if name == "IPNDMScheduler":
        return ["leading", "karras", "trailing"]
    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    timesteps = TIMESTEP_SPACINGS if "timestep_spacing" in known else ("linspace",)
    ranges = [spacing for spacing in RANGES if f"use_{spacing}_sigmas" in known]
    if name.startswith("KDPM2"):  # half a second to make one, so three are enough
        return ["linspace", "leading", "karras"]
    if sampler.startswith("dpmpp_2m_sde"):  # k-diffusion's sampler: the class's own levels are not its
        return ranges
    # A range ends at the smallest sigma itself: of the step of no length after it their formulas make 0 / 0.
    return [*timesteps, *(() if name in (MULTISTEP, UNIPC) and AT_MINIMUM.items() <= settings.items() else ranges)]


def title(case: int) -> str:
    sampler, name, settings, _ = CASES[case]
    shown = (f"{key}={getattr(value, '__name__', value)}" for key, value in settings.items())
    return " ".join([sampler, name.removesuffix("Scheduler"), *shown])


def scheduler(name: str, spacing: str, n: int, settings: Settings, sigmas: Tensor, *, exact: bool) -> Any:
    """One of diffusers', ready to begin; if `exact`, with tables in float64 in place of float32."""
    config = {key: value for key, value in settings.items() if key != "gamma"}
    if name == "IPNDMScheduler":  # knows no noise schedule of the kind; its betas are sigmas of variance 1
        config = {"trained_betas": [s / PROCESS.scale(s) for s in sigmas.tolist()]}
    elif spacing in RANGES:
        config |= tiny.SCHEDULER | {f"use_{spacing}_sigmas": True}
    else:
        config |= tiny.SCHEDULER | ({"timestep_spacing": spacing} if spacing in TIMESTEP_SPACINGS else {})
    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    made = getattr(diffusers, name)(**{key: value for key, value in config.items() if key in known})
    if exact:
        made.alphas_cumprod = PROCESS.alphas_cumprod
    made.set_timesteps(n)
    for table in ("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down"):
        if exact and hasattr(made, table):
            setattr(made, table, getattr(made, table).double())
    return made


def levels(name: str, sampler: str, spacing: str, n: int, settings: Settings) -> Tensor:
    """The sigmas that Reverie visits for a config."""
    to_minimum = name in FROM_MINIMUM or settings.get("final_sigmas_type") == "sigma_min"
    rules = SpacingRules(steps_offset=1, final_sigma=PROCESS.sigma_min if to_minimum else 0.0)
    options = {"original_steps": settings.get("original_inference_steps", 50)} if spacing == "lcm" else {}
    return visited(PRESET, sampler, spacing, n, PROCESS, rules, **options)


class Draws:
    """The same noise for both."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, *levels: object) -> Tensor:
        return torch.randn(SHAPE, generator=self.generator, dtype=torch.float64)


def share_noise(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    """Give a scheduler the noise of `Draws`."""
    draws = Draws()
    made.noise_sampler = draws
    monkeypatch.setattr(
        sys.modules[type(made).__module__], "randn_tensor",
        lambda shape, generator=None, device=None, dtype=None: draws().to(dtype), raising=False,
    )  # fmt: skip


def level(made: Any, step: int, timestep: float) -> float:
    """The noise level at which a scheduler is about to have its network asked."""
    if type(made).__name__ == "IPNDMScheduler":
        beta = float(made.betas[step])
        return beta / math.sqrt(1 - beta**2)
    if not hasattr(made, "sigmas"):
        return PROCESS.sigma(timestep)
    place = made.step_index or 0
    if getattr(made, "state_in_first_order", True):
        return float(made.sigmas[place])
    if hasattr(made, "sigmas_interpol"):
        return float(made.sigmas_interpol[place - ("Ancestral" in type(made).__name__)])
    return float(getattr(made, "mid_point_sigma", None) or made.sigmas[place])


def theirs(
    made: Any, answer: Answer, x: Tensor, final: float, gamma: float
) -> tuple[list[tuple[float, Tensor]], Tensor]:
    """What their network is asked, `(sigma, x)` in our units, and the last sample."""
    name = type(made).__name__
    own, options = name.startswith(OWN_X), {"eta": gamma} if name == "TCDScheduler" else {}
    asked = []
    sample = x if own else x / PROCESS.scale(level(made, 0, float(made.timesteps[0])))
    for step, t in enumerate(made.timesteps):
        made.scale_model_input(sample, t)
        sigma = level(made, step, float(t))
        x = sample.double() * (1.0 if own else PROCESS.scale(sigma))
        asked.append((sigma, x))
        ipndm = name == "IPNDMScheduler"  # whose timesteps are its own, and whose network says v
        x0 = answer(x, sigma, PROCESS.timestep(sigma) if ipndm else float(t))
        output = (x - x0) / sigma
        if ipndm:
            output = (output - sigma * x0) / PROCESS.scale(sigma)
        sample = made.step(output, t, sample, **options).prev_sample
    return asked, sample.double() * (1.0 if own else PROCESS.scale(final))


def told(name: str, sampler: str, spacing: str, sigmas: Tensor) -> Callable[[float], float]:
    """`(sigma) -> timestep that the network is told`."""
    rule = told_timestep(PRESET, SAMPLERS[sampler], spacing, PROCESS)
    if name.startswith("KDPM2") and spacing == "karras":  # rounded, but not between the sigmas visited
        seen = sigmas.tolist()
        return lambda sigma: round(PROCESS.timestep(sigma)) if sigma in seen else PROCESS.timestep(sigma)
    return lambda sigma: rule(PROCESS.timestep(sigma))


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """To within a share of the largest number, or of 1."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.abs().max())))


def compare(
    monkeypatch: pytest.MonkeyPatch, case: int, spacing: str, n: int, answer: Answer, *, exact: bool, tolerance: float
) -> None:
    sampler, name, settings, options = CASES[case]
    sigmas, asked = levels(name, sampler, spacing, n, settings), list[tuple[float, Tensor]]()
    tell = told(name, sampler, spacing, sigmas)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        asked.append((sigma, x))
        return answer(x, sigma, tell(sigma))

    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * float(sigmas[0])
    ours = SAMPLERS[sampler].function(denoise, x, sigmas, noise=Draws(), process=PROCESS, **options)
    made = scheduler(name, spacing, n, settings, sigmas, exact=exact)
    share_noise(monkeypatch, made)
    their_asked, want = theirs(made, answer, x, float(sigmas[-1]), settings.get("gamma", 0.3))
    if name.startswith(OWN_X) and spacing == "linspace":  # sigma is linear between timesteps there, log sigma here
        tolerance *= 10
    assert len(asked) == len(their_asked)
    for (our_sigma, our_x), (sigma, their_x) in zip(asked, their_asked, strict=True):
        assert our_sigma == pytest.approx(sigma, rel=2e-4 if "KDPM2Ancestral" in name else 3e-5)
        close(our_x / PROCESS.scale(sigma), their_x / PROCESS.scale(sigma), tolerance)
    close(ours, want, tolerance)


RUNS = [(case, spacing) for case in range(len(CASES)) for spacing in spacings(case)]


def ids(runs: list[tuple[int, str]]) -> list[str]:
    return [f"{title(case)}-{spacing}" for case, spacing in runs]


def of_mixture(x: Tensor, sigma: float, t: float) -> Tensor:
    return mixture.denoise(x, sigma)


@pytest.mark.parametrize(("case", "spacing"), RUNS, ids=ids(RUNS))
def test_step_by_step_on_a_mixture(monkeypatch: pytest.MonkeyPatch, case: int, spacing: str) -> None:
    """7 steps: below 15 diffusers lowers the order of the last ones. Measured: 6e-6, linspace 1.3e-4."""
    compare(monkeypatch, case, spacing, 7, of_mixture, exact=True, tolerance=5e-5)


LOWERING = (MULTISTEP, SINGLESTEP, UNIPC, DEIS, SA)  # the classes with lower_order_final
MANY = [(case, spacing) for case, spacing in RUNS if CASES[case][1] in LOWERING and spacing == "linspace"]


@pytest.mark.parametrize(("case", "spacing"), MANY, ids=ids(MANY))
def test_sixteen_steps_on_a_mixture(monkeypatch: pytest.MonkeyPatch, case: int, spacing: str) -> None:
    """Where there are many steps, some classes do not. Measured: 8e-6."""
    compare(monkeypatch, case, spacing, 16, of_mixture, exact=True, tolerance=5e-5)


@cache
def network() -> Answer:
    """A U-Net with random weights, in float64, which is told the timestep."""
    torch.manual_seed(0)
    unet = tiny.unet(
        layers_per_block=1, block_out_channels=(32,), norm_num_groups=8,  # of one channel, a norm would hide timesteps
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
    ).double()  # fmt: skip

    @torch.no_grad()
    def answer(x: Tensor, sigma: float, t: float) -> Tensor:
        eps: Tensor = unet(x / PROCESS.scale(sigma), torch.tensor(t), None).sample
        return x - sigma * eps

    return answer


FIRST = {CASES[case][:2]: case for case in reversed(range(len(CASES))) if "2m_sde" not in CASES[case][0]}
FRACTIONAL = {"linspace", "karras", "exponential", "beta", "lcm"}  # spacings whose timesteps may have to be rounded
ASKED = [(case, spacing) for case in sorted(FIRST.values()) for spacing in spacings(case) if spacing in FRACTIONAL]


@pytest.mark.parametrize(("case", "spacing"), ASKED, ids=ids(ASKED))
def test_step_by_step_on_a_network(monkeypatch: pytest.MonkeyPatch, case: int, spacing: str) -> None:
    """The timesteps that the network is told count here: half of one off is 0.04. Measured: 7e-6.

    diffusers' float32 tables stay: they decide how its timesteps are rounded.
    """
    compare(monkeypatch, case, spacing, 3, network(), exact=False, tolerance=5e-5)


# our sampler, their class, their settings, our options: rectified flow
FLOW: list[tuple[str, str, Settings, Settings]] = [
    ("dpmpp_2m", MULTISTEP, {}, {}),
    ("dpmpp_2m", MULTISTEP, HEUN, HEUN),
    ("dpmpp_3m", MULTISTEP, {"solver_order": 3}, {}),
    ("dpmpp_3m", MULTISTEP, SDE, {"order": 2, "eta": 1.0}),
    ("dpmpp_2s", SINGLESTEP, {}, {}),
    ("dpmpp_2s", SINGLESTEP, {"solver_order": 3}, {"order": 3}),
    ("unipc", UNIPC, {}, {}),
    ("unipc", UNIPC, {"solver_order": 3}, {"order": 3}),
    ("deis", DEIS, {}, {}),
    ("deis", DEIS, {"solver_order": 3}, {"order": 3}),
    ("sa_solver", SA, {}, {}),
    ("euler", "FlowMatchEulerDiscreteScheduler", {}, {}),
    ("heun", "FlowMatchHeunDiscreteScheduler", {}, {}),
]


def flow_levels(name: str, n: int, made: Any, process: FlowProcess) -> Tensor:
    """The sigmas that Reverie visits; those of the FlowMatch classes are given."""
    if name.startswith("FlowMatch"):
        given: Tensor = made.sigmas.double().unique().flip(0)
        return given
    sigmas = space("flow_sigmas_unipc" if name == UNIPC else "flow_sigmas", n, process)
    if name in (DEIS, SA):  # their last step has no length
        sigmas[-1] = sigmas[-2]
    return sigmas


def run_theirs(
    made: Any, output: Callable[[Tensor, float], Tensor], x: Tensor
) -> tuple[list[tuple[float, Tensor]], Tensor]:
    """A scheduler whose sample is `x` itself, whatever its network says."""
    asked = []
    for step, t in enumerate(made.timesteps):
        sigma = float(made.sigmas[step])
        asked.append((sigma, x.double()))
        x = made.step(output(x.double(), sigma), t, x).prev_sample
    return asked, x.double()


def agree(
    sampler: str, denoise: Denoise, x: Tensor, sigmas: Tensor, process: AnyProcess,
    want: tuple[list[tuple[float, Tensor]], Tensor], tolerance: float, **options: Any,
) -> None:  # fmt: skip
    asked = []

    def watched(x: Tensor, sigma: float) -> Tensor:
        asked.append((sigma, x))
        return denoise(x, sigma)

    ours = SAMPLERS[sampler].function(watched, x, sigmas, noise=Draws(), process=process, **options)
    assert len(asked) == len(want[0])
    for (our_sigma, our_x), (sigma, their_x) in zip(asked, want[0], strict=True):
        assert our_sigma == pytest.approx(sigma, rel=1e-5)
        close(our_x, their_x, tolerance)
    close(ours, want[1], tolerance)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("case", range(len(FLOW)), ids=[f"{c[0]} {c[1]} {c[2]}" for c in FLOW])
def test_rectified_flow(monkeypatch: pytest.MonkeyPatch, case: int, shift: float) -> None:
    """The network says the velocity `(x - x0) / sigma`."""
    sampler, name, settings, options = FLOW[case]
    flags = {"shift": shift} if name.startswith("FlowMatch") else {
        "use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}  # fmt: skip
    made, process = getattr(diffusers, name)(**settings, **flags), FlowProcess(shift=shift)
    made.set_timesteps(7)
    sigmas = flow_levels(name, 7, made, process)
    made.sigmas = made.sigmas.double()
    share_noise(monkeypatch, made)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = run_theirs(made, lambda x, sigma: (x - mixture.denoise_flow(x, sigma)) / sigma, x)
    agree(sampler, mixture.denoise_flow, x, sigmas, process, want, 1e-4, **options)


# our sampler, their class, their settings, our options: EDM
EDM: list[tuple[str, str, Settings, Settings]] = [
    ("euler", "EDMEulerScheduler", {}, {}),
    ("dpmpp_2m", "EDMDPMSolverMultistepScheduler", {}, {}),
    ("dpmpp_2m", "EDMDPMSolverMultistepScheduler", HEUN | AT_MINIMUM, HEUN),
    ("dpmpp_3m", "EDMDPMSolverMultistepScheduler", {"solver_order": 3}, {}),
    ("dpmpp_3m", "EDMDPMSolverMultistepScheduler", SDE, {"order": 2, "eta": 1.0}),
]


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("case", range(len(EDM)), ids=[f"{c[0]} {c[1]} {c[2]}" for c in EDM])
def test_edm(monkeypatch: pytest.MonkeyPatch, case: int, schedule: str) -> None:
    """Samplers of ours under another process; the network says F of `x0 = c_skip x + c_out F`."""
    sampler, name, settings, options = EDM[case]
    made = getattr(diffusers, name)(sigma_schedule=schedule, **settings)
    made.set_timesteps(7)
    made.sigmas = made.sigmas.double()
    share_noise(monkeypatch, made)
    process = EdmProcess(sigma_data=made.config.sigma_data)

    def output(x: Tensor, sigma: float) -> Tensor:
        made.scale_model_input(x, made.timesteps[0])
        total = sigma**2 + process.sigma_data**2
        skip, out = process.sigma_data**2 / total, sigma * process.sigma_data / math.sqrt(total)
        return (mixture.denoise(x, sigma) - skip * x) / out

    sigmas = made.sigmas.clone()
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * float(sigmas[0])
    agree(sampler, mixture.denoise, x, sigmas, process, run_theirs(made, output, x), 1e-4, **options)
