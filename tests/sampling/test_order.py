"""Every sampler on a Gaussian, where denoiser, solution and marginals are known in closed form."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.diffusion.spacing import space
from reverie.sampling.samplers.lms import coefficients
from tests.sampling import mixture
from tests.sampling.gaussian import (
    FLOW,
    MEAN,
    SAMPLERS,
    VP,
    Path,
    denoiser,
    logarithmic,
    run,
    silent,
    solution,
    variance,
)

NAMES = list(SAMPLERS)
DETERMINISTIC = [name for name in NAMES if not SAMPLERS[name].stochastic and not SAMPLERS[name].adaptive]
DISTILLED = {"lcm", "tcd"}  # made for networks that answer where the ODE ends, not with the mean
STOCHASTIC = [name for name in NAMES if name not in DISTILLED]
# (sampler, options) for everything that adds noise
NOISY: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in STOCHASTIC if SAMPLERS[name].stochastic]
NOISY += [(name, {"eta": 0.5}) for name in STOCHASTIC if "eta" in SAMPLERS[name].options]
NOISY += [(n, {"eta": 1.0}) for n in STOCHASTIC if "eta" in SAMPLERS[n].options and not SAMPLERS[n].stochastic]
NOISY += [(name, {"s_churn": 5.0}) for name in STOCHASTIC if "s_churn" in SAMPLERS[name].options]
FLOWING = [(name, options) for name, options in NOISY if SAMPLERS[name].flow]
TIGHT = {"rtol": 0.002, "atol": 0.0003}  # for dpm_adaptive
# Errors are added up over several, because on one alone the leading terms of a method may cancel.
INTERVALS = ((2.0, 0.3), (8.0, 0.5), (1.0, 0.1))
FLOW_INTERVALS = ((0.9, 0.3), (0.8, 0.1))
Grid = Callable[[float, float, int], Tensor]


def error(name: str, sigmas: Tensor, process: AnyProcess = VP, **options: Any) -> float:
    start, end = float(sigmas[0]), float(sigmas[-1])
    x = torch.linspace(-2, 2, 9, dtype=torch.float64) * math.sqrt(variance(process, start))
    got = run(name, x, sigmas, process, **options)
    return float((got - solution(process, x, start, end)).abs().max())


def measured_order(name: str, grid: Grid, n: int, process: AnyProcess = VP) -> float:
    """log2 of how much half the step gains."""
    intervals = INTERVALS if process is VP else FLOW_INTERVALS
    few, many = (sum(error(name, grid(*ends, k), process) for ends in intervals) for k in (n, 2 * n))
    return math.log2(few / many)


def karras(start: float, end: float, n: int) -> Tensor:
    ramp = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    roots: Tensor = start ** (1 / 7) + ramp * (end ** (1 / 7) - start ** (1 / 7))
    return roots**7


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_is_the_registered_one(name: str) -> None:
    """Between positive sigmas, 96 and 192 steps (both divide by 3, which matters to dpm_fast).

    0.1 leaves room for the higher terms (measured: at most 0.03), and is far below 1.
    """
    assert measured_order(name, logarithmic, 96) == pytest.approx(SAMPLERS[name].order, abs=0.1)


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if SAMPLERS[name].flow])
def test_order_holds_for_rectified_flow(name: str) -> None:
    """Measured: within 0.07 (heunpp2)."""
    assert measured_order(name, logarithmic, 192, FLOW) == pytest.approx(SAMPLERS[name].order, abs=0.1)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_holds_on_karras_spacing(name: str) -> None:
    """Measured: at most 0.1 below."""
    assert measured_order(name, karras, 192) >= SAMPLERS[name].order - 0.25


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_solution_is_reached_from_the_models_own_range(name: str) -> None:
    """The whole range of Stable Diffusion in 256 steps."""
    bound = {1: 1e-2, 2: 2e-4, 3: 2e-5}[SAMPLERS[name].order]
    assert error(name, logarithmic(VP.sigma_max, VP.sigma_min, 256)) < bound


@pytest.mark.parametrize("name", sorted({n for n, o in NOISY if "eta" in o and not SAMPLERS[n].adaptive}))
def test_without_fresh_noise_it_is_the_ode(name: str) -> None:
    """At eta 0 the samplers that add noise solve the ODE: the first-order ones come within 3e-3 in 192 steps."""
    drawn: Callable[..., Tensor] = Path((9,))  # with weight 0
    assert error(name, logarithmic(2.0, 0.3, 192), eta=0.0, noise=drawn) < 6e-3


def test_lms_is_of_order_4_once_it_has_four_slopes() -> None:
    """Steps that double from h² to h keep the error of the Euler start at h⁴, the order of the rest. Measured: 3.92."""

    def grid(start: float, end: float, n: int) -> Tensor:
        h = 1 / n
        u, step = [0.0], h * h
        while u[-1] < 1:
            u.append(min(u[-1] + min(step, h), 1.0))
            step *= 2
        ramp = torch.tensor(u, dtype=torch.float64)
        return (math.log(start) + ramp * (math.log(end) - math.log(start))).exp()

    assert measured_order("lms", grid, 64) == pytest.approx(4, abs=0.2)


def test_lms_integrates_cubics_exactly() -> None:
    nodes, start, end = [2.0, 2.7, 3.1, 4.0], 2.0, 1.1
    for power in range(4):
        got = sum(w * t**power for w, t in zip(coefficients(nodes, start, end), nodes, strict=True))
        assert got == pytest.approx((end ** (power + 1) - start ** (power + 1)) / (power + 1), rel=1e-10)


def test_dpm_fast_is_of_order_3_where_its_last_step_is_of_order_2() -> None:
    """191 and 383 evaluations are 64 and 128 steps, all of third order but the last."""
    few, many = (error("dpm_fast", logarithmic(2.0, 0.3, n)) for n in (191, 383))
    assert math.log2(few / many) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("order", [2, 3])
def test_dpm_adaptive_comes_as_near_as_it_is_told(order: int) -> None:
    """The tolerance bounds the error of a step. Measured: 0.13 and 0.03 at 0.05, 7e-4 and 8e-4 at 0.0005."""
    sigmas = logarithmic(VP.sigma_max, VP.sigma_min, 1)
    loose, tight = (error("dpm_adaptive", sigmas, order=order, rtol=t, atol=t / 6) for t in (0.05, 0.0005))
    assert loose < 0.2
    assert tight < 2e-3


@pytest.mark.parametrize(("steps", "option", "first_order"), [(14, None, True), (15, None, False), (9, False, False)])
def test_last_step_of_dpmpp_2m_is_of_first_order_when_steps_are_few(
    steps: int, option: bool | None, first_order: bool
) -> None:
    """`lower_order_final` of diffusers' DPMSolverMultistepScheduler, below 15 steps; k-diffusion has no such rule."""
    seen: list[tuple[Tensor, float, Tensor]] = []

    def watching(x: Tensor, sigma: float) -> Tensor:
        seen.append((x, sigma, denoiser(VP)(x, sigma)))
        return seen[-1][2]

    sigmas = logarithmic(8.0, 0.2, steps)
    start = torch.tensor([3.0], dtype=torch.float64)
    got = run("dpmpp_2m", start, sigmas, denoise=watching, lower_order_final=option)
    x, sigma, x0 = seen[-1]
    down = float(sigmas[-1])
    step = x0 + (down / sigma) * (x - x0)  # DPM-Solver++ of order 1 is DDIM
    assert torch.allclose(got, step, rtol=1e-12) == first_order


def test_pndm_loses_an_order_on_irregular_steps() -> None:
    """Its weights are those of equal steps; the docstring says so, and this keeps it honest."""

    def grid(start: float, end: float, n: int) -> Tensor:
        u = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        u[1:-1:2] += 0.3 / n
        return (math.log(start) + u * (math.log(end) - math.log(start))).exp()

    assert measured_order("pndm", grid, 256) == pytest.approx(1, abs=0.2)


def sampled(name: str, sigmas: Tensor, process: AnyProcess, options: dict[str, Any]) -> Tensor:
    """10,000 pixels from noise."""
    path = Path((10_000,))
    start = float(sigmas[0])
    if SAMPLERS[name].adaptive:
        options = {**options, **TIGHT}
    x = process.alpha(start) * MEAN + path() * math.sqrt(variance(process, start))
    return run(name, x, sigmas, process, noise=path, **options)


def check_marginal(x: Tensor, process: AnyProcess, sigma: float) -> None:
    """Mean within 4 standard errors; deviation within 4 and the 2 % that 100 steps of finite size may take."""
    deviation = math.sqrt(variance(process, sigma))
    error = deviation / math.sqrt(len(x))
    assert float(x.mean()) == pytest.approx(process.alpha(sigma) * MEAN, abs=4 * error)
    assert float(x.std()) == pytest.approx(deviation, abs=4 * error / math.sqrt(2) + 0.02 * deviation)


@pytest.mark.parametrize(("name", "options"), NOISY)
def test_noisy_samplers_keep_mean_and_variance(name: str, options: dict[str, Any]) -> None:
    sigmas = space("karras", 100, VP)
    ends_above = name in {"dpm_fast", "dpm_adaptive"}  # at the last sigma above 0
    check_marginal(sampled(name, sigmas, VP, options), VP, float(sigmas[-2]) if ends_above else 0.0)


@pytest.mark.parametrize(("name", "options"), [case for case in NOISY if "eta" not in case[1]])
def test_noisy_samplers_keep_the_marginal_on_the_way(name: str, options: dict[str, Any]) -> None:
    """Stopped at sigma 0.5, the variance is s² + 0.25: not only the end is right."""
    sigmas = logarithmic(VP.sigma_max, 0.5, 100)
    check_marginal(sampled(name, sigmas, VP, options), VP, 0.5)


@pytest.mark.parametrize(("name", "options"), FLOWING)
def test_noisy_samplers_keep_the_marginals_of_rectified_flow(name: str, options: dict[str, Any]) -> None:
    """From pure noise, whose log-SNR is infinite, to sigma 0.2."""
    sigmas = torch.linspace(1.0, 0.2, 101, dtype=torch.float64)
    check_marginal(sampled(name, sigmas, FLOW, options), FLOW, 0.2)


@pytest.mark.parametrize(("process", "start"), [(VP, VP.sigma_max), (FLOW, 1.0)])
def test_lcm_keeps_the_marginals_of_a_consistent_network(process: AnyProcess, start: float) -> None:
    def consistent(x: Tensor, sigma: float) -> Tensor:
        return solution(process, x, sigma, 0.0)

    sigmas = torch.tensor([start, 0.7, 0.4, 0.2], dtype=torch.float64)
    x = sampled("lcm", sigmas, process, {"denoise": consistent})
    check_marginal(x, process, 0.2)
    check_marginal(sampled("lcm", torch.cat([sigmas, torch.zeros(1)]), process, {"denoise": consistent}), process, 0.0)


MIXED = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@cache
def by_runge_kutta(start: float, end: float, n: int) -> Tensor:
    """Where the ODE of the mixture under rectified flow takes MIXED, by the classical method of order 4."""

    def d(x: Tensor, sigma: float) -> Tensor:
        return (x - mixture.denoise_flow(x, sigma)) / sigma

    x, h = MIXED, (end - start) / n
    for i in range(n):
        t = start + i * h
        k1 = d(x, t)
        k2 = d(x + h / 2 * k1, t + h / 2)
        k3 = d(x + h / 2 * k2, t + h / 2)
        k4 = d(x + h * k3, t + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize("name", [n for n in NAMES if SAMPLERS[n].flow and not SAMPLERS[n].stochastic])
def test_a_mixture_under_rectified_flow(name: str) -> None:
    """From pure noise to sigma 0.05, 100 steps, against 250 steps of a method of order 4.

    Measured: 1.2e-2 for those of first order, at most 1.3e-3 for the others.
    """
    options = TIGHT if SAMPLERS[name].adaptive else {}
    got = run(name, MIXED, torch.linspace(1.0, 0.05, 101, dtype=torch.float64), FLOW, denoise=mixture.denoise_flow,
              noise=silent, **options)  # fmt: skip
    first_order = SAMPLERS[name].order == 1
    torch.testing.assert_close(got, by_runge_kutta(1.0, 0.05, 250), rtol=0, atol=2e-2 if first_order else 2e-3)
