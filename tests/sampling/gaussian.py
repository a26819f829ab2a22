"""Pixels from one Gaussian: denoiser, solution of the probability-flow ODE and marginals in closed form.

If pixels are N(mu, s²), then `x = alpha x0 + sigma noise` is N(alpha mu, v) with `v = alpha² s² + sigma²`; the best
denoiser is `mu + alpha s² / v (x - alpha mu)`, and along the ODE `(x - alpha mu) / sqrt(v)` stays as it is.
"""

import math
from bisect import bisect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reverie.diffusion.process import AnyProcess, FlowProcess, Process
from reverie.sampling.registry import load_all
from reverie.types import Denoise

MEAN, DEVIATION = 0.3, 0.5
VP, FLOW = Process.named(), FlowProcess()
SAMPLERS = load_all()


def variance(process: AnyProcess, sigma: float) -> float:
    return (process.alpha(sigma) * DEVIATION) ** 2 + sigma**2


def denoiser(process: AnyProcess) -> Denoise:
    def denoise(x: Tensor, sigma: float) -> Tensor:
        alpha = process.alpha(sigma)
        return MEAN + alpha * DEVIATION**2 / variance(process, sigma) * (x - alpha * MEAN)

    return denoise


def solution(process: AnyProcess, x: Tensor, start: float, end: float) -> Tensor:
    """Where the ODE takes `x`."""
    stretch = math.sqrt(variance(process, end) / variance(process, start))
    return process.alpha(end) * MEAN + (x - process.alpha(start) * MEAN) * stretch


def silent(*levels: float) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def run(
    name: str,
    x: Tensor,
    sigmas: Tensor,
    process: AnyProcess = VP,
    *,
    noise: Callable[..., Tensor] = silent,
    denoise: Denoise | None = None,
    **options: Any,
) -> Tensor:
    """The sampler `name`; CFG++ forms with the same answer for the negative prompt, which is no guidance."""
    entry, denoise = SAMPLERS[name], denoise or denoiser(process)
    if entry.unconditional:
        options.setdefault("unconditional", denoise)
    return entry.function(denoise, x, sigmas, noise=noise, process=process, **options)


def logarithmic(start: float, end: float, n: int) -> Tensor:
    """Equal steps of log sigma: the clock of DPM-Solver, and smooth, which is all that the others need."""
    return torch.linspace(math.log(start), math.log(end), n + 1, dtype=torch.float64).exp()


class Path:
    """A Brownian path in float64, made up where it is asked for; without levels, independent noise."""

    def __init__(self, shape: Sequence[int], seed: int = 0) -> None:
        self.shape = tuple(shape)
        self.generator = torch.Generator().manual_seed(seed)
        self.known: dict[float, Tensor] = {}

    def normal(self) -> Tensor:
        return torch.randn(self.shape, generator=self.generator, dtype=torch.float64)

    def __call__(self, *levels: float) -> Tensor:
        if not levels:
            return self.normal()
        start, end = levels
        return (self.at(end) - self.at(start)) / math.sqrt(abs(end - start))

    def at(self, t: float) -> Tensor:
        if t not in self.known:
            self.known[t] = self.bridged(t) if self.known else torch.zeros(self.shape, dtype=torch.float64)
        return self.known[t]

    def bridged(self, t: float) -> Tensor:
        times = sorted(self.known)
        after = bisect(times, t)
        if after in {0, len(times)}:
            near = times[min(after, len(times) - 1)]
            return self.known[near] + math.sqrt(abs(t - near)) * self.normal()
        a, b = times[after - 1], times[after]
        w = (t - a) / (b - a)
        return torch.lerp(self.known[a], self.known[b], w) + math.sqrt((b - a) * w * (1 - w)) * self.normal()
