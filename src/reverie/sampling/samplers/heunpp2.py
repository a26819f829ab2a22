"""Heun++: slopes at three noise levels, weighted by sigma."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.registry import sampler
from reverie.sampling.steps import CHURN, churned, pairs, slope
from reverie.types import Denoise, Noise


@sampler("heunpp2", "heun++2", order=1, source="Carzit, sd-webui-samplers-scheduler, Heun++ (2023)", options=CHURN,
         label="HeunPP2", evaluations=lambda n: max(3 * n - 3, 1), flow=True)  # fmt: skip
def heunpp2(
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
    """Slopes at the beginning of a step, at its end and one step further; of those ahead, each counts sigma / sigma_0.

    The last step is Euler's and the one before it looks one step ahead. The weights sum to 1 but are not those of a
    method of higher order: order 1 in all.

    Args:
        s_churn: noise added before the steps, spread over all of them; 0 is the ODE alone.
        s_tmin, s_tmax: the sigmas between which it is added.
        s_noise: its standard deviation, 1 or a little more.
    """
    levels: list[float] = sigmas.tolist()
    for i, (sigma, down) in enumerate(pairs(sigmas)):
        x, hat = churned(x, sigma, len(sigmas) - 1, noise, process, s_churn, s_tmin, s_tmax, s_noise)
        slopes = [slope(denoise, x, hat)]
        ahead, here = x, hat
        for visited in levels[i + 1 : -1][:2]:
            ahead = ahead + (visited - here) * slopes[-1]
            slopes.append(slope(denoise, ahead, visited))
            here = visited
        weights = [visited / (len(slopes) * levels[0]) for visited in levels[i + 1 : i + len(slopes)]]
        d = (1 - sum(weights)) * slopes[0]
        for weight, later in zip(weights, slopes[1:], strict=True):
            d = d + weight * later
        x = x + (down - hat) * d
    return x
