"""Trajectory consistency distillation: strategic stochastic sampling."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import within
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("tcd", order=0, source="Zheng et al. 2024, Trajectory Consistency Distillation, algorithm 4",
         diffusers="TCDScheduler", whole_timesteps=True, unit_start=True, options=("gamma",))  # fmt: skip
def tcd(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise, process: AnyProcess, gamma: float = 0.3
) -> Tensor:
    """Step to a timestep below the next, then add noise up to it; for models (LoRAs) distilled by TCD or LCM.

    Other models are not exact over such steps, however many there are. diffusers ends at the smallest trained sigma.

    Args:
        gamma: from the next timestep t to `(1 - gamma) t`, rounded down: 0 is DDIM, 1 multistep consistency sampling
            (diffusers calls it eta).

    Raises:
        RequestError: an option out of range.
    """
    within("gamma", gamma, 0, 1)
    for sigma, down in pairs(sigmas):
        x0 = denoise(x, sigma)
        if down == 0:
            return x0
        below = down
        if gamma > 0:  # a millionth: timestep and sigma are each other's inverse but for rounding
            below = min(process.sigma(math.floor((1 - gamma) * process.timestep(down) + 1e-6)), down)
        eps = (x - process.alpha(sigma) * x0) / sigma
        back = process.alpha(down) / process.alpha(below)
        x = back * (process.alpha(below) * x0 + below * eps)
        if below < down:
            x = x + math.sqrt(down**2 - (back * below) ** 2) * noise()
    return x
