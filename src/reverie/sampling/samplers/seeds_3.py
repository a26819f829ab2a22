"""SEEDS-3, an exponential Runge-Kutta method for the diffusion SDE."""

import math

import torch
from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import idle, leg, sigma_at, within
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("seeds_3", order=0, source="Gonzalez et al. 2023, SEEDS-3, in terms of x0 as in ComfyUI",
         evaluations=lambda n: 3 * n - 2, options=("eta", "r_1", "r_2"), flow=True)  # fmt: skip
def seeds_3(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    eta: float = 1.0,
    r_1: float = 1 / 3,
    r_2: float = 2 / 3,
) -> Tensor:
    """Three evaluations a step, at its start and the fractions `r_1` < `r_2` in log-SNR, along one path of the noise.

    Args:
        eta: stochasticity, 0 the ODE.
        r_1, r_2: from 0.01 to 0.99, at least 0.01 apart.

    Raises:
        RequestError: an option out of range.
    """
    within("eta", eta, 0, 100)
    within("r_1", r_1, 0.01, 0.98)
    within("r_2", r_2, r_1 + 0.01, 0.99)
    for sigma, down in pairs(sigmas):
        x0 = denoise(x, sigma)
        if down == 0:
            return x0
        if idle(sigma, down):
            continue
        whole = leg(process, sigma, down, eta)
        lam, lam_next = process.log_snr(sigma), process.log_snr(down)
        if math.isinf(lam):  # pure noise has no log-SNR, so no places within the step
            x = whole.first_order(x, x0)
            x = x + whole.noise * noise() if eta else x
            continue
        before, path, later, at = sigma, torch.zeros_like(x), x0, 1.0
        for fraction in (r_1, r_2, 1.0):
            stop = sigma_at(process, lam + fraction * (lam_next - lam)) if fraction < 1 else down
            way, last = leg(process, sigma, stop, eta), leg(process, before, stop, eta)
            if eta:
                path = last.keep * path + last.noise * noise()
            ahead = way.first_order(x, x0) + (way.weight(2) * fraction / at) * (later - x0) + path
            if fraction < 1:
                before, later, at = stop, denoise(ahead, stop), fraction
        x = ahead
    return x
