"""Arithmetic that several samplers share."""

import math
from itertools import pairwise

from torch import Tensor

from reverie.diffusion.process import AnyProcess, FlowProcess, Process
from reverie.types import Denoise, Noise

CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")  # the options of `churned`


def pairs(sigmas: Tensor) -> list[tuple[float, float]]:
    """`(sigma, next sigma)` for every step."""
    return list(pairwise(sigmas.tolist()))


def slope(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    """`dx/dsigma = (x - x0) / sigma` of the probability-flow ODE: the noise, or the velocity of rectified flow."""
    return (x - denoise(x, sigma)) / sigma


def ancestral(sigma: float, down: float, eta: float) -> tuple[float, float]:
    """Split a step of a variance-preserving process into a deterministic part and fresh noise.

    The noise has the standard deviation of the DDPM posterior times `eta` (Song et al. 2021, DDIM, equation 16).

    Args:
        sigma: where the step begins; may be infinite.

    Returns:
        `(sigma to step down to, standard deviation of the noise to add)`.
    """
    ratio = down / sigma
    up = min(down, eta * down * math.sqrt(max((1 - ratio) * (1 + ratio), 0.0)))
    return math.sqrt(down**2 - up**2), up


def split(process: AnyProcess, sigma: float, down: float, eta: float) -> tuple[float, float, float]:
    """Split a step of any process: step to `target`, then `keep * x + up * noise` is at `down`.

    Rectified flow steps below by a share of the step that is linear in `eta` (ComfyUI, which with `eta` 1 is DDPM's).

    Returns:
        `(target, keep, up)`.
    """
    if isinstance(process, FlowProcess):
        target = down * max(1 + eta * (down / sigma - 1), 0.0)
        return target, *renoise(process, target, down)
    target, up = ancestral(sigma, down, eta)
    return target, 1.0, up


def renoise(process: AnyProcess, low: float, high: float) -> tuple[float, float]:
    """`(keep, up)`: `keep * x + up * noise` takes a sample at `low` up to `high` in one step of the forward process."""
    if low == high:
        return 1.0, 0.0
    keep = process.alpha(high) / process.alpha(low)
    return keep, math.sqrt(max(high**2 - (keep * low) ** 2, 0.0))


def churned(
    x: Tensor,
    sigma: float,
    steps: int,
    noise: Noise,
    process: AnyProcess,
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
) -> tuple[Tensor, float]:
    """Noise added before a step (Karras et al. 2022, algorithm 2, lines 4 to 6): the sample and its new sigma.

    Where churn is on, noise is drawn at every step, also at those outside `s_tmin` to `s_tmax` (k-diffusion).
    """
    if s_churn <= 0:
        return x, sigma
    fresh = noise()
    gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
    hat = min(sigma * (1 + gamma), process.limit)
    keep, up = renoise(process, sigma, hat)
    return keep * x + s_noise * up * fresh, hat


def heun_step(denoise: Denoise, x: Tensor, sigma: float, down: float) -> Tensor:
    """One step with the average of the slopes at both ends; Euler's to 0 (Karras et al. 2022, algorithm 1)."""
    d = slope(denoise, x, sigma)
    euler = x + (down - sigma) * d
    if down == 0:
        return euler
    return x + (down - sigma) * ((d + slope(denoise, euler, down)) / 2)


def dpm_solver(denoise: Denoise, x: Tensor, sigma: float, down: float, order: int) -> tuple[Tensor, Tensor]:
    """One step of the singlestep DPM-Solver of order 1, 2 or 3, in the clock -log sigma (Lu et al. 2022, DPM-Solver).

    Algorithms 1 and 2 (r1 1/2; r1 1/3, r2 2/3), with Euler's formula where it is the same. `order` evaluations.

    Returns:
        The results of order `order - 1` (for order 1, of 1) and of `order`.
    """
    d = slope(denoise, x, sigma)
    first = x + (down - sigma) * d
    if order == 1:
        return first, first
    h, r1 = math.log(sigma / down), 1 / order
    middle = sigma * math.exp(-r1 * h)
    change = slope(denoise, x + (middle - sigma) * d, middle) - d
    second = first + (down - sigma) / (2 * r1) * change
    if order == 2:
        return first, second
    later = sigma * math.exp(-2 / 3 * h)
    bend = math.expm1(2 / 3 * h) / (2 / 3 * h) - 1
    guess = x + (later - sigma) * d - later * 2 * bend * change
    bend = math.expm1(h) / h - 1
    return second, first - down * 1.5 * bend * (slope(denoise, guess, later) - d)


def landing(process: Process, sigma: float, down: float, stride: int | None, final: float) -> float:
    """Where diffusers' DDIM and PNDM land: `stride` timesteps below, or at `final`; without a stride at `down`."""
    if stride is None:
        return down
    t = round(process.timestep(sigma)) - stride
    return process.sigma(t) if t >= 0 else final


def relabelled(x: Tensor, process: Process, landed: float, visited: float) -> Tensor:
    """`x` at `landed` taken to be at `visited`: the DDPM sample x_t stays, so its value in units of sigma changes."""
    return x if landed == visited else x * (process.scale(visited) / process.scale(landed))
