"""Spacings against the numbers that diffusers' schedulers visit."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reverie.diffusion.process import Process
from reverie.diffusion.spacing import SIGMA_SPACINGS, SPACINGS, TIMESTEP_SPACINGS, SpacingRules, space
from reverie.errors import RequestError
from tests.tiny import diffusers

PROCESS = Process.named()
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = (1, 2, 3, 7, 10, 20, 30, 50, 100, 333)

# diffusers' sigmas are float32 and come from a float32 product of 1000 factors: 1e-5 relative.
FLOAT32 = 2e-5
# Between whole timesteps diffusers' Euler interpolates sigma, Reverie (as k-diffusion) log sigma.
# Largest difference in these cases: 8.5e-5, near t = 10 where sigma bends most.
BETWEEN = 1e-4


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


@given(st.sampled_from(list(SPACINGS)), st.integers(1, 1000), st.booleans(), st.booleans())
def test_every_spacing_descends_to_the_final_sigma(name: str, n: int, extra: bool, whole: bool) -> None:
    rules = SpacingRules(extra_point=extra and name in TIMESTEP_SPACINGS and n < 1000, whole_timesteps=whole)
    sigmas = space(name, n, PROCESS, rules)
    assert sigmas.shape == (n + 1,)
    assert sigmas.dtype == torch.float64
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0


@pytest.mark.parametrize("name", list(SPACINGS))
def test_final_sigma_is_the_last(name: str) -> None:
    assert space(name, 5, PROCESS, SpacingRules(final_sigma=0.01))[-1] == 0.01


@pytest.mark.parametrize("name", list(SIGMA_SPACINGS))
def test_sigma_spacings_span_the_range(name: str) -> None:
    sigmas = space(name, 9, PROCESS)
    assert float(sigmas[0]) == pytest.approx(PROCESS.sigma_max, rel=1e-12)
    assert float(sigmas[-2]) == pytest.approx(PROCESS.sigma_min, rel=1e-12)


def test_karras_is_equation_5() -> None:
    low, high, n = PROCESS.sigma_min, PROCESS.sigma_max, 6
    want = [(high ** (1 / 7) + i / (n - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(n)]
    torch.testing.assert_close(space("karras", n, PROCESS)[:-1], torch.tensor(want, dtype=torch.float64))


def test_exponential_is_equally_spaced_in_log_sigma() -> None:
    steps = space("exponential", 8, PROCESS)[:-1].log().diff()
    torch.testing.assert_close(steps, steps[:1].expand(7))


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("ddim_uniform", "leading"),
        ("simple", "trailing"),
        ("normal", "linspace"),
        ("Uniform", "linspace"),
        ("Karras", "karras"),
        ("Exponential", "exponential"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert SPACINGS.name(alias) == name
    assert torch.equal(space(alias, 4, PROCESS), space(name, 4, PROCESS))


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"unknown spacing 'karas'; did you mean 'karras'\? Known: leading"):
        space("karas", 5, PROCESS)


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_number_of_steps_is_bounded(n: int) -> None:
    with pytest.raises(RequestError, match=rf"steps is {n}; this model allows 1 to 1000"):
        space("leading", n, PROCESS)
