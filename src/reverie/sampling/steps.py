"""Arithmetic that several samplers share."""

import math
from itertools import pairwise

from torch import Tensor

from reverie.diffusion.process import Process


def pairs(sigmas: Tensor) -> list[tuple[float, float]]:
    """`(sigma, next sigma)` for every step."""
    return list(pairwise(sigmas.tolist()))


def ancestral(sigma: float, down: float, eta: float) -> tuple[float, float]:
    """Split a step into a deterministic part and fresh noise so that the marginal stays right.

    The noise has the standard deviation of the DDPM posterior times `eta` (Song et al. 2021, DDIM, equation 16).

    Returns:
        `(sigma to step down to, standard deviation of the noise to add)`.
    """
    up = min(down, eta * math.sqrt(max(down**2 * (sigma**2 - down**2) / sigma**2, 0.0)))
    return math.sqrt(down**2 - up**2), up


def landing(process: Process, sigma: float, down: float, stride: int | None, final: float) -> float:
    """Where diffusers' DDIM and PNDM land: `stride` timesteps below, or at `final`; without a stride at `down`."""
    if stride is None:
        return down
    t = round(process.timestep(sigma)) - stride
    return process.sigma(t) if t >= 0 else final


def relabelled(x: Tensor, process: Process, landed: float, visited: float) -> Tensor:
    """`x` at `landed` taken to be at `visited`: the DDPM sample x_t stays, so its value in units of sigma changes."""
    return x if landed == visited else x * (process.scale(visited) / process.scale(landed))
