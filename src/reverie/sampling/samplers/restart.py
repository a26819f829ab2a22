"""Restart sampling: Heun's method, going back up in noise and down again."""

import math

import torch
from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.diffusion.spacing import karras
from reverie.sampling.exponential import sigma_at
from reverie.sampling.registry import sampler
from reverie.sampling.steps import heun_step, pairs, renoise
from reverie.types import Denoise, Noise

# AUTOMATIC1111's choice for Stable Diffusion: from sigma 0.1 back to 2, once from 20 steps on, twice from 36.
LOW, HIGH = 0.1, 2.0
ONCE, TWICE = 20, 36
STEPS = 9  # down again, for a single restart


@sampler("restart", order=0, source="Xu et al. 2023, Restart Sampling, algorithm 1, with AUTOMATIC1111's intervals",
         options=("s_noise",), label="Restart", spacing="karras", evaluations=lambda n: 2 * n - 1,
         flow=True)  # fmt: skip
def restart(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    s_noise: float = 1.0,
) -> Tensor:
    """From 20 steps on Heun steps between Karras sigmas, those of the restarts counted in; below, Heun's method alone.

    Args:
        s_noise: standard deviation of the noise that leads back up, 1 or a little more.
    """
    last = float(sigmas[0])
    for sigma, down in planned(sigmas, process):
        if sigma > last:
            keep, up = renoise(process, last, sigma)
            x = keep * x + s_noise * up * noise()
        x = heun_step(denoise, x, sigma, down)
        last = down
    return x


def planned(sigmas: Tensor, process: AnyProcess) -> list[tuple[float, float]]:
    """`(sigma, next sigma)` of every step, the restarts in their places."""
    n = len(sigmas) - 1
    if n < ONCE:
        return pairs(sigmas)
    steps, times = (STEPS, 1) if n < TWICE else (n // 4, 2)
    grid = _grid(sigmas, n - steps * times)
    low, high = (int((grid - sigma_at(process, -math.log(level))).abs().argmin()) for level in (LOW, HIGH))
    down = pairs(grid)
    if high >= low:
        return down
    again = pairs(karras(steps + 1, float(grid[low]), float(grid[high])))
    return down[:low] + again * times + down[low:]


def _grid(sigmas: Tensor, n: int) -> Tensor:
    """`n` steps between Karras sigmas, with the ends of `sigmas`."""
    start, before, last = float(sigmas[0]), float(sigmas[-2]), float(sigmas[-1])
    if last > 0:
        return karras(n + 1, last, start)
    return torch.cat([karras(n, before, start), torch.zeros(1, dtype=torch.float64)])
