"""Euler's method on the probability-flow ODE."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.registry import sampler
from reverie.sampling.steps import CHURN, churned, pairs, slope
from reverie.types import Denoise, Noise


@sampler("euler", "k_euler", order=1, source="Karras et al. 2022, algorithm 2 with Euler steps", options=CHURN,
         label="Euler", diffusers="EulerDiscreteScheduler", flow=True)  # fmt: skip
def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """`dx/dsigma = (x - x0) / sigma`, one evaluation a step.

    Args:
        s_churn: noise added before the steps, spread over all of them; 0 is the ODE alone.
        s_tmin, s_tmax: the sigmas between which it is added.
        s_noise: its standard deviation, 1 or a little more.
    """
    for sigma, down in pairs(sigmas):
        x, hat = churned(x, sigma, len(sigmas) - 1, noise, process, s_churn, s_tmin, s_tmax, s_noise)
        x = x + (down - hat) * slope(denoise, x, hat)
    return x
