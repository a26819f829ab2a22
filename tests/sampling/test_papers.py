"""Samplers that k-diffusion has not, against their formulas written down once more, step by step and in float64."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.diffusion.spacing import karras, space
from reverie.sampling.samplers.restart import planned
from tests.sampling import mixture
from tests.sampling.gaussian import FLOW, VP, Path, logarithmic, run

GRIDS = {
    "karras": space("karras", 9, VP).tolist(),
    "exponential": space("exponential", 8, VP).tolist(),
    "above 0": logarithmic(9.0, 0.4, 7).tolist(),
}
SHAPE = (1, 4, 3, 3)
Network = Callable[[Tensor, float], Tensor]


@pytest.fixture(params=GRIDS)
def grid(request: pytest.FixtureRequest) -> list[float]:
    found: list[float] = GRIDS[request.param]
    return found


def check(name: str, grid: list[float], want: Callable[..., Tensor], process: AnyProcess = VP, **options: Any) -> None:
    """Both get the same noise. Float64 rounding, at most 1e-12 here."""
    denoise = mixture.denoise if process is VP else mixture.denoise_flow
    x = Path(SHAPE, seed=1)() * grid[0]
    got = run(name, x, torch.tensor(grid, dtype=torch.float64), process, noise=Path(SHAPE), denoise=denoise, **options)
    torch.testing.assert_close(got, want(denoise, x, grid, Path(SHAPE)), rtol=1e-10, atol=1e-10)


def test_gradient_estimation(grid: list[float]) -> None:
    """Permenter & Yuan 2024, algorithm 2: the noise estimate is `gamma eps_t + (1 - gamma) eps_{t+1}`."""

    def want(denoise: Network, x: Tensor, grid: list[float], noise: Path) -> Tensor:
        eps: list[Tensor] = []
        for sigma, down in pairwise(grid):
            eps.append((x - denoise(x, sigma)) / sigma)
            used = eps[-1] if len(eps) == 1 or down == 0 else 1.7 * eps[-1] - 0.7 * eps[-2]
            x = x + (down - sigma) * used
        return x

    check("gradient_estimation", grid, want, ge_gamma=1.7)


def test_heunpp2(grid: list[float]) -> None:
    """Three slopes weighted 1 - w2 - w3, w2, w3 with w = sigma / (3 sigma_0); two with sigma / (2 sigma_0); one."""

    def want(denoise: Network, x: Tensor, grid: list[float], noise: Path) -> Tensor:
        def d(x: Tensor, sigma: float) -> Tensor:
            return (x - denoise(x, sigma)) / sigma

        for i in range(len(grid) - 1):
            d1, dt = d(x, grid[i]), grid[i + 1] - grid[i]
            if i == len(grid) - 2:
                x = x + dt * d1
                continue
            x2 = x + dt * d1
            d2 = d(x2, grid[i + 1])
            if i == len(grid) - 3:
                w2 = grid[i + 1] / (2 * grid[0])
                x = x + dt * ((1 - w2) * d1 + w2 * d2)
                continue
            d3 = d(x2 + (grid[i + 2] - grid[i + 1]) * d2, grid[i + 2])
            w2, w3 = grid[i + 1] / (3 * grid[0]), grid[i + 2] / (3 * grid[0])
            x = x + dt * ((1 - w2 - w3) * d1 + w2 * d2 + w3 * d3)
        return x

    check("heunpp2", grid, want)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_res_multistep(grid: list[float], eta: float) -> None:
    """Zhang et al. 2023: `x e^-h + h (b1 D + b2 D_old)`, b2 = phi_2(-h) / c2, b1 = phi_1(-h) - b2, c2 = -h_old / h."""

    def want(denoise: Network, x: Tensor, grid: list[float], noise: Path) -> Tensor:
        h_old, old = 0.0, torch.zeros(())
        for i, (sigma, down) in enumerate(pairwise(grid)):
            up = eta * down * math.sqrt(1 - down**2 / sigma**2)
            target = math.sqrt(down**2 - up**2)
            x0 = denoise(x, sigma)
            if target == 0 or i == 0:
                x = x + (target - sigma) * (x - x0) / sigma
            else:
                h = math.log(sigma / target)
                phi1 = (math.exp(-h) - 1) / -h
                phi2 = (phi1 - 1) / -h
                b2 = phi2 / (-h_old / h)
                x = math.exp(-h) * x + h * ((phi1 - b2) * x0 + b2 * old)
            if up > 0:
                x = x + up * noise()
            h_old, old = math.log(sigma / target) if target else 0.0, x0
        return x

    if eta == 0:
        check("res_multistep", grid, want)
    else:
        check("res_multistep_ancestral", grid, want, eta=eta)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("process", [VP, FLOW])
def test_er_sde(grid: list[float], process: AnyProcess, stages: int) -> None:
    """Cui et al. 2023, algorithms 1 to 3, lambda = sigma / alpha and phi(lambda) = lambda (e^(lambda^0.3) + 10)."""

    def phi(level: Any) -> Any:
        return level * (np.exp(level**0.3) + 10)

    def want(denoise: Network, x: Tensor, grid: list[float], noise: Path) -> Tensor:
        levels = [sigma / process.alpha(sigma) for sigma in grid]
        answers: list[Tensor] = []
        slopes: list[Tensor] = [torch.zeros(())]
        for i, (s, t) in enumerate(pairwise(levels)):
            answers.append(denoise(x, grid[i]))
            if t == 0:
                return answers[-1]
            alpha_s, alpha_t, r = process.alpha(grid[i]), process.alpha(grid[i + 1]), phi(t) / phi(s)
            x = alpha_t / alpha_s * r * x + alpha_t * (1 - r) * answers[-1]
            places = np.linspace(t, s, 200, endpoint=False)
            width = (s - t) / 200
            if i >= 1 and stages >= 2:
                slopes.append((answers[-1] - answers[-2]) / (s - levels[i - 1]))
                x = x + alpha_t * (t - s + phi(t) * float((1 / phi(places)).sum() * width)) * slopes[-1]
            if i >= 2 and stages >= 3:
                bend = (slopes[-1] - slopes[-2]) / ((s - levels[i - 2]) / 2)
                integral = float(((places - s) / phi(places)).sum() * width)
                x = x + alpha_t * ((t - s) ** 2 / 2 + phi(t) * integral) * bend
            x = x + alpha_t * math.sqrt(t**2 - (s * r) ** 2) * noise()
        return x

    flow = np.linspace(0.98, 0.0 if grid[-1] == 0 else 0.2, len(grid)).tolist()
    check("er_sde", grid if process is VP else flow, want, process, max_stage=stages)


@pytest.mark.parametrize(("n", "steps", "times"), [(20, 9, 1), (35, 9, 1), (36, 9, 2), (50, 12, 2)])
def test_restart_goes_back_from_a_tenth_to_two(n: int, steps: int, times: int) -> None:
    """AUTOMATIC1111's: 9 steps once from n = 20 on, n // 4 twice from 36; n steps in all, between Karras sigmas."""
    way = planned(space("linspace", n, VP), VP)
    assert len(way) == n
    main = [*karras(n - steps * times, VP.sigma_min, VP.sigma_max).tolist(), 0.0]
    low, high = (min(main, key=lambda sigma: abs(sigma - level)) for level in (0.1, 2.0))
    back = [i for i in range(1, n) if way[i][0] > way[i - 1][1]]
    assert len(back) == times
    for i in back:
        assert way[i - 1][1] == pytest.approx(low)
        assert way[i][0] == pytest.approx(high)
        assert way[i + steps - 1][1] == pytest.approx(low)
    kept = [step for i, step in enumerate(way) if not any(j <= i < j + steps for j in back)]
    assert [sigma for sigma, _ in kept] == pytest.approx(main[:-1])
    assert kept[-1][1] == 0


@pytest.mark.parametrize("n", [19, 24, 40])
def test_restart(n: int) -> None:
    """Xu et al. 2023, algorithm 1: Heun's method, and noise of variance `high² - low²` to go back."""

    def want(denoise: Network, x: Tensor, grid: list[float], noise: Path) -> Tensor:
        at = grid[0]
        for sigma, down in visited(grid):
            if sigma > at:
                x = x + 1.01 * math.sqrt(sigma**2 - at**2) * noise()
            d = (x - denoise(x, sigma)) / sigma
            euler = x + (down - sigma) * d
            x = x + (down - sigma) * (d + (euler - denoise(euler, down)) / down) / 2 if down > 0 else euler
            at = down
        return x

    def visited(grid: list[float]) -> Iterator[tuple[float, float]]:
        steps = {24: 9, 40: 10}.get(n, 0)
        times = {24: 1, 40: 2}.get(n, 0)
        if times:
            grid = [*karras(n - steps * times, grid[-2], grid[0]).tolist(), 0.0]
        low, high = (min(range(len(grid)), key=lambda i: abs(grid[i] - level)) for level in (0.1, 2.0))
        for i in range(len(grid) - 1):
            yield grid[i], grid[i + 1]
            if i + 1 == low:
                again = karras(steps + 1, grid[low], grid[high]).tolist()
                for _ in range(times):
                    yield from pairwise(again)

    check("restart", space("karras", n, VP).tolist(), want, s_noise=1.01)


def test_restart_stays_below_where_a_picture_begins() -> None:
    """From sigma 0.09, as with little strength, there is nothing to go back to: n Heun steps less the restart's."""
    way = planned(logarithmic(0.09, 0.03, 24), VP)
    assert all(sigma == before for (_, before), (sigma, _) in pairwise(way))
    assert way[0][0] == pytest.approx(0.09)
    assert way[-1][1] == pytest.approx(0.03)


def test_restart_measures_rectified_flow_by_its_noise_to_signal_ratio() -> None:
    """sigma / (1 - sigma) from 0.1 to 2 is sigma from 1/11 to 2/3."""
    way = planned(torch.linspace(1, 0, 101, dtype=torch.float64), FLOW)
    tops = [(before, sigma) for (_, before), (sigma, _) in pairwise(way) if sigma > before]
    assert len(tops) == 2
    for low, high in tops:
        assert low == pytest.approx(1 / 11, abs=0.02)
        assert high == pytest.approx(2 / 3, abs=0.02)


@pytest.mark.parametrize("process", [VP, FLOW])
def test_lcm(process: AnyProcess) -> None:
    def want(denoise: Network, x: Tensor, grid: list[float], noise: Path) -> Tensor:
        for sigma, down in pairwise(grid):
            x = process.alpha(down) * denoise(x, sigma) + (down * noise() if down > 0 else 0)
        return x

    check("lcm", [0.99, 0.7, 0.3, 0.0] if process is FLOW else [14.6, 3.0, 0.5, 0.0], want, process)


def test_lcm_with_and_without_its_boundary_condition() -> None:
    """ComfyUI leaves it out, diffusers and AUTOMATIC1111 scale timesteps by 10: from t 19 on less than 1e-4 apart."""
    sigmas = torch.tensor([*(VP.sigma(t) for t in (999, 759, 499, 259, 19)), 0.0], dtype=torch.float64)
    x = Path(SHAPE, seed=1)() * float(sigmas[0])
    without, with_it = (
        run("lcm", x, sigmas, noise=Path(SHAPE), denoise=mixture.denoise, timestep_scaling=scaling)
        for scaling in (0.0, 10.0)
    )
    assert not torch.equal(without, with_it)
    torch.testing.assert_close(without, with_it, rtol=0, atol=1e-4)
    at_0 = torch.tensor([VP.sigma(0), 0.0], dtype=torch.float64)  # where a consistency function is the identity
    start = Path(SHAPE)()
    got = run("lcm", start, at_0, noise=Path(SHAPE), denoise=mixture.denoise, timestep_scaling=10.0)
    torch.testing.assert_close(got, start / VP.scale(VP.sigma(0)))
