"""Heun's method on the probability-flow ODE."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.registry import sampler
from reverie.sampling.steps import CHURN, churned, heun_step, pairs
from reverie.types import Denoise, Noise


@sampler("heun", "k_heun", order=2, source="Karras et al. 2022, algorithm 2", options=CHURN, label="Heun",
         diffusers="HeunDiscreteScheduler", evaluations=lambda n: 2 * n - 1, flow=True)  # fmt: skip
def heun(
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
    """An Euler step, then the average of the slopes at both ends; the step to 0 is Euler's alone.

    Args:
        s_churn: noise added before the steps, spread over all of them; 0 is the ODE alone.
        s_tmin, s_tmax: the sigmas between which it is added.
        s_noise: its standard deviation, 1 or a little more.
    """
    for sigma, down in pairs(sigmas):
        x, hat = churned(x, sigma, len(sigmas) - 1, noise, process, s_churn, s_tmin, s_tmax, s_noise)
        x = heun_step(denoise, x, hat, down)
    return x
