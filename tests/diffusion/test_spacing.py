"""Every spacing over every kind of process, and what is said of requests that cannot be."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reverie.diffusion.process import AnyProcess, EdmProcess, FlowProcess, Process
from reverie.diffusion.spacing import SPACINGS, TIMESTEP_SPACINGS, SpacingRules, manual, space
from reverie.errors import RequestError
from tests.tiny import diffusers

PROCESS = Process.named()
FLOW = FlowProcess(shift=3.0)
PROCESSES: dict[str, AnyProcess] = {
    "stable diffusion": PROCESS,
    "linear": Process.named("linear", start=0.0001, end=0.02),
    "cosine": Process.named("cosine"),
    "zero terminal SNR": Process.named(zero_terminal_snr=True),
    "flow": FLOW,
    "edm": EdmProcess(),
}
RANGES = [name for name in SPACINGS if "sigma_min" in SPACINGS[name].options]
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = (1, 2, 3, 7, 10, 20, 30, 50, 100, 333)

# diffusers' sigmas are float32 and come from a float32 product of 1000 factors: 1e-5 relative.
FLOAT32 = 2e-5
# Between whole timesteps diffusers' Euler interpolates sigma, Reverie (as k-diffusion) log sigma.
# Largest difference in these cases: 8.5e-5, near t = 10 where sigma bends most.
BETWEEN = 1e-4

# Spacings that are not for every process or number of steps, and what they say then.
REFUSALS = {
    "flow_sigmas": "is for flow models",
    "flow_sigmas_unipc": "is for flow models",
    "vp": "no sigma above 1",
    "align_your_steps": "no sigma above 1",
    "ays": "no sigma above 1",
    "align_your_steps_32": "no sigma above 1",
    "align_your_steps_gits": "no sigma above 1",
    "gits": "no sigma above 1",
    "lcm": "allows 1 to original_steps, which is 50",
    "sd_turbo": "allows 1 to 10",
}


@pytest.mark.parametrize("process", list(PROCESSES))
@pytest.mark.parametrize("name", list(SPACINGS))
@pytest.mark.parametrize("n", [1, 2, 3, 10, 31, 999, 1000])
def test_every_spacing_descends_or_says_why_not(name: str, process: str, n: int) -> None:
    try:
        sigmas = space(name, n, PROCESSES[process])
    except RequestError as error:
        assert REFUSALS[name] in str(error)
        return
    assert sigmas.dtype == torch.float64
    assert torch.isfinite(sigmas).all()
    assert (sigmas.diff() < 0).all()
    assert (sigmas[-1] == 0) != SPACINGS[name].to_minimum
    assert 0 < sigmas[0] <= PROCESSES[process].limit
    if SPACINGS[name].exact:
        assert len(sigmas) == n + 1


@given(st.sampled_from(TIMESTEP_SPACINGS), st.integers(1, 998), st.booleans(), st.booleans(), st.integers(0, 1))
def test_timestep_spacings_by_every_rule(name: str, n: int, extra: bool, whole: bool, offset: int) -> None:
    rules = SpacingRules(extra_point=extra, whole_timesteps=whole, steps_offset=offset)
    sigmas = space(name, n, PROCESS, rules)
    assert sigmas.shape == (n + 1,)
    assert (sigmas.diff() < 0).all()


def test_one_point_more_than_there_are_timesteps() -> None:
    with pytest.raises(RequestError, match="leading has not 999 different noise levels"):
        space("leading", 999, PROCESS, SpacingRules(extra_point=True, steps_offset=1))


@pytest.mark.parametrize("name", [name for name in SPACINGS if not SPACINGS[name].to_minimum])
def test_final_sigma_is_the_last(name: str) -> None:
    process = FLOW if "flow" in name else PROCESS
    assert (
        space(name, 5, process, SpacingRules(final_sigma=0.002), **({"eps_s": 0.1} if name == "vp" else {}))[-1]
        == 0.002
    )


@pytest.mark.parametrize("name", list(SPACINGS))
@pytest.mark.parametrize("n", [2, 9])
def test_discarding_leaves_out_the_last_above_the_end(name: str, n: int) -> None:
    process = FLOW if "flow" in name else PROCESS
    whole = space(name, n + 1, process)
    short = space(name, n, process, SpacingRules(discard_penultimate=True))
    torch.testing.assert_close(short, torch.cat([whole[:-2], whole[-1:]]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["karras", "exponential", "polyexponential", "beta", "kl_optimal", "uniform"])
@pytest.mark.parametrize("process", list(PROCESSES))
def test_ranges_span_the_trained_sigmas(name: str, process: str) -> None:
    chosen = PROCESSES[process]
    sigmas = space(name, 9, chosen, SpacingRules(base="model"))
    assert float(sigmas[0]) == pytest.approx(chosen.sigma_max, rel=1e-12)
    if not (name == "uniform" and process == "flow"):  # its last timestep is shifted twice, see FlowProcess.ends
        assert float(sigmas[-2]) == pytest.approx(chosen.sigma_min, rel=1e-12)


@pytest.mark.parametrize("name", RANGES)
def test_ends_of_the_range_can_be_set(name: str) -> None:
    sigmas = space(name, 12, PROCESS, sigma_min=0.1, sigma_max=10)
    assert float(sigmas[0]) == pytest.approx(10, rel=1e-9)
    if name == "sgm_uniform":  # it leaves out the end
        assert sigmas[-2] > 0.1
    else:
        assert float(sigmas[-1 if SPACINGS[name].to_minimum else -2]) == pytest.approx(0.1, rel=1e-9)


def combinations() -> list[tuple[str, str, int]]:
    return list(itertools.product(TIMESTEP_SPACINGS, ("", "karras", "exponential"), (0, 1)))


def euler(base: str, kind: str, offset: int, final: str = "zero") -> Any:
    chosen = {f"use_{kind}_sigmas": True} if kind else {}
    return diffusers.EulerDiscreteScheduler(
        **BETAS, timestep_spacing=base, steps_offset=offset, final_sigmas_type=final, **chosen
    )


@pytest.mark.parametrize(("base", "kind", "offset"), combinations())
def test_sigmas_equal_diffusers_euler(base: str, kind: str, offset: int) -> None:
    scheduler = euler(base, kind, offset)
    for n in STEPS[1:] if base == "linspace" and kind else STEPS:  # diffusers' karras of one linspace step is sigma_min
        scheduler.set_timesteps(n)
        got = space(kind or base, n, PROCESS, SpacingRules(steps_offset=offset, base=base))
        tolerance = BETWEEN if base == "linspace" and not kind else FLOAT32
        torch.testing.assert_close(got, scheduler.sigmas.double(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", ["", "karras", "exponential"])
def test_final_sigma_equals_diffusers_euler(kind: str) -> None:
    scheduler = euler("trailing", kind, 0, final="sigma_min")
    scheduler.set_timesteps(10)
    rules = SpacingRules(base="trailing", final_sigma=PROCESS.sigma_min)
    got = space(kind or "trailing", 10, PROCESS, rules)
    torch.testing.assert_close(got, scheduler.sigmas.double(), rtol=FLOAT32, atol=0)


@pytest.mark.parametrize(("base", "kind", "offset"), combinations())
def test_sigmas_equal_diffusers_dpm_solver(base: str, kind: str, offset: int) -> None:
    chosen = {f"use_{kind}_sigmas": True} if kind else {}
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, timestep_spacing=base, steps_offset=offset, **chosen)
    rules = SpacingRules(steps_offset=offset, extra_point=not kind, whole_timesteps=True)
    for n in STEPS:
        scheduler.set_timesteps(n)
        got = space(kind or base, n, PROCESS, rules)
        torch.testing.assert_close(got, scheduler.sigmas.double(), rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("base", list(TIMESTEP_SPACINGS))
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_equal_diffusers(name: str, base: str, offset: int) -> None:
    extra: dict[str, Any] = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    scheduler = getattr(diffusers, name)(**BETAS, timestep_spacing=base, steps_offset=offset, **extra)
    for n in STEPS:
        scheduler.set_timesteps(n)
        want = scheduler.timesteps.tolist()
        if name == "PNDMScheduler" and n > 1:
            del want[1]  # its second evaluation, for the doubled first step
        sigmas = space(base, n, PROCESS, SpacingRules(steps_offset=offset, whole_timesteps=True))
        got = [round(PROCESS.timestep(sigma), 6) for sigma in sigmas[:-1].tolist()]
        assert got == want, n


def test_karras_is_equation_5() -> None:
    low, high, n = PROCESS.sigma_min, PROCESS.sigma_max, 6
    for rho in (7.0, 3.0):
        want = [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)]
        got = space("karras", n, PROCESS, rho=rho)[:-1]
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_exponential_is_equally_spaced_in_log_sigma() -> None:
    steps = space("exponential", 8, PROCESS)[:-1].log().diff()
    torch.testing.assert_close(steps, steps[:1].expand(7))


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("Simple", "simple"),
        ("normal", "uniform"),
        ("Uniform", "uniform"),
        ("discrete", "uniform"),
        ("DDIM", "ddim_uniform"),
        ("SGM Uniform", "sgm_uniform"),
        ("SGMUniform", "sgm_uniform"),
        ("Karras", "karras"),
        ("use_karras_sigmas", "karras"),
        ("Exponential", "exponential"),
        ("Polyexponential", "polyexponential"),
        ("KL Optimal", "kl_optimal"),
        ("Align Your Steps", "align_your_steps"),
        ("align_your_steps_11", "align_your_steps"),
        ("align_your_steps_GITS", "align_your_steps_gits"),
        ("Beta", "beta"),
        ("Turbo", "turbo"),
        ("use_lu_lambdas", "lu_lambdas"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert SPACINGS.name(alias) == name


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"unknown spacing 'karas'; did you mean 'karras'\? Known: leading"):
        space("karas", 5, PROCESS)


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_number_of_steps_is_bounded(n: int) -> None:
    with pytest.raises(RequestError, match=rf"steps is {n}; this model allows 1 to 1000"):
        space("leading", n, PROCESS)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "karras",
            {"roh": 5},
            "spacing karras has no option 'roh'; did you mean rho? it has sigma_min, sigma_max, rho",
        ),
        ("simple", {"rho": 5}, "spacing simple has no option 'rho'; it has none"),
        ("karras", {"rho": "7"}, "option rho of spacing karras is '7'; expected a number from 0.1 to 100"),
        ("karras", {"rho": True}, "option rho of spacing karras is True; expected a number"),
        ("karras", {"rho": 0}, "option rho of spacing karras is 0; expected a number from 0.1"),
        ("karras", {"rho": math.nan}, "option rho of spacing karras is nan; expected a number"),
        ("beta", {"alpha": math.inf}, "option alpha of spacing beta is inf"),
        ("lcm", {"original_steps": 2.5}, "option original_steps of spacing lcm is 2.5; expected a whole number"),
        ("karras", {"sigma_min": 20}, "sigma_min is 20 and sigma_max 14.6146; sigma_max must be the larger"),
        ("linear_quadratic", {"linear_steps": 5}, "linear_steps is 5; of 5 steps at most 4 can be linear"),
        ("lcm", {"original_steps": 4}, "steps is 5; spacing lcm allows 1 to original_steps, which is 4"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        space(name, 5, PROCESS, None, **options)
    assert said in str(caught.value)


def test_levels_that_repeat_are_refused() -> None:
    with pytest.raises(RequestError, match="leading has not 1000 different noise levels here; ask for fewer steps"):
        space("leading", 1000, PROCESS, SpacingRules(extra_point=True))


def test_levels_below_the_end_are_refused() -> None:
    with pytest.raises(RequestError, match=r"goes down to sigma 0\.001, below the end of the last step, 0\.029"):
        space("karras", 5, PROCESS, SpacingRules(final_sigma=PROCESS.sigma_min), sigma_min=0.001)


@pytest.mark.parametrize("name", ["align_your_steps", "ays", "align_your_steps_32", "align_your_steps_gits", "gits"])
def test_published_lists_are_for_some_models(name: str) -> None:
    with pytest.raises(RequestError, match=rf"spacing {name} is published for sd1.*; this model is sd9"):
        space(name, 10, PROCESS, SpacingRules(tables="sd9"))


def test_manual_levels_are_taken_as_they_are() -> None:
    assert manual((14.6, 3.0, 0.5), PROCESS).tolist() == [14.6, 3.0, 0.5]
    assert manual((1.0, 0.0), FLOW).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((), "sigmas has 0; at least two are needed"),
        ((3.0,), "sigmas has 1; at least two are needed"),
        ((3.0, math.nan), "sigmas[1] is nan; expected a number of at least 0"),
        ((math.inf, 0.0), "sigmas[0] is inf; expected a number of at least 0"),
        ((3.0, -1.0), "sigmas[1] is -1.0; expected a number of at least 0"),
        ((3.0, 3.0), "sigmas[1] is 3.0 after 3.0; each must be below the one before"),
        ((1.0, 2.0), "sigmas[1] is 2.0 after 1.0; each must be below the one before"),
    ],
)
def test_manual_levels_that_cannot_be(values: tuple[float, ...], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        manual(values, PROCESS)
    assert said in str(caught.value)


def test_manual_levels_above_a_flow_models() -> None:
    with pytest.raises(RequestError, match=r"sigmas\[0\] is 14.6; this model has no sigma above 1"):
        manual((14.6, 0.0), FLOW)
