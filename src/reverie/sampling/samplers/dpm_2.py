"""DPM-Solver-2, the midpoint method in log sigma."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.registry import sampler
from reverie.sampling.steps import CHURN, churned, pairs, slope
from reverie.types import Denoise, Noise


@sampler("dpm_2", "k_dpm_2", "kdpm_2", order=2, options=CHURN,
         source="k-diffusion sample_dpm_2, after Lu et al. 2022 (DPM-Solver) and Karras et al. 2022, algorithm 2",
         label="DPM2", spacing="karras", discards=("a1111", "comfy"), diffusers="KDPM2DiscreteScheduler",
         evaluations=lambda n: 2 * n - 1, flow=True)  # fmt: skip
def dpm_2(
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
    """The slope half-way in log sigma decides the whole step; the step to 0 is Euler's.

    Args:
        s_churn: noise added before the steps, spread over all of them; 0 is the ODE alone.
        s_tmin, s_tmax: the sigmas between which it is added.
        s_noise: its standard deviation, 1 or a little more.
    """
    for sigma, down in pairs(sigmas):
        x, hat = churned(x, sigma, len(sigmas) - 1, noise, process, s_churn, s_tmin, s_tmax, s_noise)
        d = slope(denoise, x, hat)
        if down > 0:
            middle = math.sqrt(hat * down)
            d = slope(denoise, x + (middle - hat) * d, middle)
        x = x + (down - hat) * d
    return x
