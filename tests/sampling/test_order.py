"""Every sampler on a Gaussian, where denoiser and solution are known in closed form.

If pixels are N(mu, s²), the best denoiser is `x0 = (s² x + sigma² mu) / (s² + sigma²)`, and the probability-flow ODE
has the solution `x(b) = mu + (x(a) - mu) sqrt((s² + b²) / (s² + a²))`.
"""

import inspect
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reverie.sampling.samplers
from reverie.diffusion.noise import SeededNoise
from reverie.diffusion.process import Process
from reverie.diffusion.spacing import SPACINGS, space
from reverie.sampling.registry import Sampler, load_all
from reverie.sampling.samplers.lms import coefficients
from reverie.types import Denoise

MEAN, DEVIATION = 0.3, 0.5
PROCESS = Process.named()
ZERO_SNR = Process.named(zero_terminal_snr=True)
SAMPLERS = load_all()
NAMES = list(SAMPLERS)
DETERMINISTIC = [name for name in NAMES if not SAMPLERS[name].stochastic]
# (sampler, options) for everything that adds noise
NOISY: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in NAMES if SAMPLERS[name].stochastic]
NOISY += [(name, {"eta": eta}) for name in NAMES if "eta" in SAMPLERS[name].options for eta in (0.5, 1.0)]


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """The denoiser of N(MEAN, DEVIATION²)."""
    s = DEVIATION**2
    return (s * x + sigma**2 * MEAN) / (s + sigma**2)


def solution(x: Tensor, start: float, end: float) -> Tensor:
    """Where the ODE takes `x`."""
    return MEAN + (x - MEAN) * math.sqrt((DEVIATION**2 + end**2) / (DEVIATION**2 + start**2))


def silent() -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def run(name: str, x: Tensor, sigmas: Tensor, process: Process = PROCESS, **options: Any) -> Tensor:
    noise = options.pop("noise", silent)
    result: Tensor = SAMPLERS[name].function(gaussian, x, sigmas, noise=noise, process=process, **options)
    return result


def logarithmic(start: float, end: float, n: int) -> Tensor:
    """Equal steps of log sigma: the clock of DPM-Solver, and smooth, which is all that the others need."""
    return torch.linspace(math.log(start), math.log(end), n + 1, dtype=torch.float64).exp()


def error(name: str, sigmas: Tensor) -> float:
    start, end = float(sigmas[0]), float(sigmas[-1])
    x = torch.linspace(-2, 2, 9, dtype=torch.float64) * math.sqrt(DEVIATION**2 + start**2)
    return float((run(name, x, sigmas) - solution(x, start, end)).abs().max())


def measured_order(name: str, grid: Callable[[int], Tensor], n: int) -> float:
    """log2 of how much half the step gains."""
    return math.log2(error(name, grid(n)) / error(name, grid(2 * n)))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_is_the_registered_one(name: str) -> None:
    """Between two positive sigmas, 256 and 512 steps.

    Measured: euler, ddim, heun, pndm within 0.005 of it; dpmpp_2m 2.01; lms 2.02.

    0.1 leaves room for the higher terms at 256 steps, and is far below 1.
    """
    order = measured_order(name, lambda n: logarithmic(2.0, 0.3, n), 256)
    assert order == pytest.approx(SAMPLERS[name].order, abs=0.1)


@pytest.mark.parametrize("spacing", ["karras", "time"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_holds_on_other_smooth_spacings(name: str, spacing: str) -> None:
    def grid(n: int) -> Tensor:
        u = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        if spacing == "karras":
            roots: Tensor = 2.0 ** (1 / 7) + u * (0.3 ** (1 / 7) - 2.0 ** (1 / 7))
            return roots**7
        first, last = PROCESS.timestep(2.0), PROCESS.timestep(0.3)
        return torch.tensor([PROCESS.sigma(float(t)) for t in first + u * (last - first)], dtype=torch.float64)

    # The table of sigmas is linear between timesteps: about as many steps as timesteps blur the order a little.
    order = measured_order(name, grid, 64 if spacing == "time" else 256)
    assert order >= SAMPLERS[name].order - 0.25


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_solution_is_reached_from_the_models_own_range(name: str) -> None:
    """The whole range of Stable Diffusion in 256 steps; errors: 6e-3 (euler, ddim), at most 7.5e-5 (the others)."""
    bound = {1: 1e-2, 2: 2e-4}[SAMPLERS[name].order]
    assert error(name, logarithmic(PROCESS.sigma_max, PROCESS.sigma_min, 256)) < bound


def test_lms_is_of_order_4_once_it_has_four_slopes() -> None:
    """Steps that double from h² to h keep the error of the Euler start at h⁴, the order of the rest. Measured: 3.92."""

    def grid(n: int) -> Tensor:
        h = 1 / n
        u, step = [0.0], h * h
        while u[-1] < 1:
            u.append(min(u[-1] + min(step, h), 1.0))
            step *= 2
        ramp = torch.tensor(u, dtype=torch.float64)
        return (math.log(2.0) + ramp * (math.log(0.3) - math.log(2.0))).exp()

    assert measured_order("lms", grid, 64) == pytest.approx(4, abs=0.2)


def test_lms_integrates_cubics_exactly() -> None:
    nodes, start, end = [2.0, 2.7, 3.1, 4.0], 2.0, 1.1
    for power in range(4):
        got = sum(w * t**power for w, t in zip(coefficients(nodes, start, end), nodes, strict=True))
        assert got == pytest.approx((end ** (power + 1) - start ** (power + 1)) / (power + 1), rel=1e-10)


@pytest.mark.parametrize(("steps", "first_order"), [(14, True), (15, False)])
def test_last_step_of_dpmpp_2m_is_of_first_order_when_steps_are_few(steps: int, first_order: bool) -> None:
    """`lower_order_final` of diffusers' DPMSolverMultistepScheduler: below 15 steps."""
    seen: list[tuple[Tensor, float, Tensor]] = []

    def watching(x: Tensor, sigma: float) -> Tensor:
        seen.append((x, sigma, gaussian(x, sigma)))
        return seen[-1][2]

    start = torch.tensor([3.0], dtype=torch.float64)
    sigmas = logarithmic(8.0, 0.2, steps)
    got = SAMPLERS["dpmpp_2m"].function(watching, start, sigmas, noise=silent, process=PROCESS)
    x, sigma, x0 = seen[-1]
    down = float(sigmas[-1])
    step = x0 + (down / sigma) * (x - x0)  # DPM-Solver++ of order 1 is DDIM
    assert torch.allclose(got, step, rtol=1e-12) == first_order


def test_pndm_loses_an_order_on_irregular_steps() -> None:
    """Its weights are those of equal steps; the docstring says so, and this keeps it honest."""

    def grid(n: int) -> Tensor:
        u = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        u[1:-1:2] += 0.3 / n
        return (math.log(2.0) + u * (math.log(0.3) - math.log(2.0))).exp()

    assert measured_order("pndm", grid, 256) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("name", "options"), NOISY)
def test_noisy_samplers_keep_mean_and_variance(name: str, options: dict[str, Any]) -> None:
    """200 steps of 20000 pixels. The seed is fixed; measured: mean within 0.006, deviation within 0.011.

    Statistics: the mean's standard error is s / sqrt(20000) = 0.0035, the deviation's s / sqrt(40000) = 0.0025;
    steps of finite size take up to 2 % from the deviation.
    """
    sigmas = space("karras", 200, PROCESS)
    g = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(20_000, generator=g, dtype=torch.float64)

    x = run(name, noise() * PROCESS.sigma_max, sigmas, noise=noise, **options)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.015)
    assert float(x.std()) == pytest.approx(DEVIATION, abs=0.015)


@pytest.mark.parametrize(("name", "options"), NOISY)
def test_noisy_samplers_keep_the_marginal_on_the_way(name: str, options: dict[str, Any]) -> None:
    """Stopped at sigma 0.5, the variance is s² + 0.25: not only the end is right."""
    sigmas = logarithmic(PROCESS.sigma_max, 0.5, 200)
    g = torch.Generator().manual_seed(1)

    def noise() -> Tensor:
        return torch.randn(20_000, generator=g, dtype=torch.float64)

    x = run(name, noise() * PROCESS.sigma_max, sigmas, noise=noise, **options)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.025)
    assert float(x.std()) == pytest.approx(math.sqrt(DEVIATION**2 + 0.25), abs=0.025)


def draw(name: str, seed: int, **options: Any) -> Tensor:
    noise = SeededNoise([seed], (4, 3, 3))
    return run(name, noise() * PROCESS.sigma_max, space("leading", 12, PROCESS), noise=noise, **options)


@pytest.mark.parametrize("name", NAMES)
def test_repeatable(name: str) -> None:
    assert torch.equal(draw(name, 5), draw(name, 5))
    assert not torch.equal(draw(name, 5), draw(name, 6))


@pytest.mark.parametrize("name", NAMES)
def test_thread_safe(name: str) -> None:
    """Eight at once give what they give one after the other."""
    alone = [draw(name, seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: draw(name, seed), list(range(8)) * 4))
    assert all(torch.equal(a, b) for a, b in zip(alone * 4, together, strict=True))


@pytest.mark.parametrize("n", [1, 2, 3, 20])
@pytest.mark.parametrize("name", NAMES)
def test_number_of_evaluations(name: str, n: int) -> None:
    calls: list[float] = []

    def counted(x: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return gaussian(x, sigma)

    entry, noise = SAMPLERS[name], SeededNoise([0], (2,))
    x = noise() * PROCESS.sigma_max
    entry.function(counted, x, space("leading", n, PROCESS), noise=noise, process=PROCESS)
    assert len(calls) == entry.evaluations(n)
    assert all(sigma > 0 for sigma in calls)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_to_zero_is_the_first_answer(name: str) -> None:
    noise = SeededNoise([0], (5,))
    x = noise().double() * 10
    got = run(name, x, torch.tensor([10.0, 0.0], dtype=torch.float64), noise=noise)
    # x + (0 - sigma) (x - x0) / sigma rounds at the size of x
    torch.testing.assert_close(got, gaussian(x, 10.0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("spacing", list(SPACINGS))
@pytest.mark.parametrize("name", NAMES)
def test_float32_survives_zero_terminal_snr(name: str, spacing: str) -> None:
    """From sigma 4096 in float32; no picture is far from the data's N(0.3, 0.5²)."""
    noise = SeededNoise([1], (4, 8, 8))
    x = noise() * ZERO_SNR.sigma_max
    got = run(name, x, space(spacing, 20, ZERO_SNR), ZERO_SNR, noise=noise)
    assert got.dtype == torch.float32
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_no_length_does_no_harm(name: str, place: int) -> None:
    """Spacings repeat a sigma where timesteps round to one (1000 steps) or Karras meets a final sigma above 0."""
    sigmas = [8.0, 4.0, 2.0, 1.0, 0.5]
    sigmas.insert(place, sigmas[place])
    noise = SeededNoise([1], (4,))
    got = run(name, noise() * 8, torch.tensor(sigmas, dtype=torch.float64), noise=noise)
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("name", NAMES)
def test_x_is_not_changed_in_place(name: str) -> None:
    noise = SeededNoise([1], (4,))
    x = torch.ones(1, 4)
    run(name, x, space("karras", 5, PROCESS), noise=noise)
    assert torch.equal(x, torch.ones(1, 4))


def test_one_file_a_sampler() -> None:
    folder = Path(reverie.sampling.samplers.__file__).parent
    stems = {file.stem for file in folder.glob("[a-z]*.py")}
    assert set(NAMES) == stems
    for name in NAMES:
        assert Path(inspect.getsourcefile(SAMPLERS[name].function) or "").stem == name


@pytest.mark.parametrize("name", NAMES)
def test_registration_tells_what_one_needs_to_know(name: str) -> None:
    entry: Sampler = SAMPLERS[name]
    parameters = inspect.signature(entry.function).parameters
    assert list(parameters)[:3] == ["denoise", "x", "sigmas"]
    assert set(entry.options) <= set(parameters)
    assert entry.function.__doc__
    assert entry.source
    assert SAMPLERS.name(entry.diffusers) == name  # the class of diffusers is an alias


def test_denoise_type_is_the_only_contract() -> None:
    denoise: Denoise = gaussian  # mypy checks that a plain function is enough
    assert denoise(torch.zeros(1), 1.0).shape == (1,)
