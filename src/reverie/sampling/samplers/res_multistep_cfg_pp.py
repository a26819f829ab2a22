"""The refined exponential solver (RES), multistep, with CFG++."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import idle, leg
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs, split
from reverie.types import Denoise, Noise


@sampler("res_multistep_cfg_pp", order=2, unconditional=True, options=("eta",), flow=True,
         source="Chung et al. 2024, CFG++, on Zhang et al. 2023, RES (arXiv 2308.02157), as in ComfyUI")  # fmt: skip
def res_multistep_cfg_pp(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    unconditional: Denoise,
    eta: float = 0.0,
) -> Tensor:
    """Exponential integrator through the last two unconditional answers, the guidance added before each step.

    The guidance scales are those of `euler_cfg_pp`.

    Args:
        unconditional: x0 of the negative prompt alone, where `denoise` was last asked.
        eta: share of fresh noise, from 0 to 1.
    """
    old: tuple[float, Tensor] | None = None  # how far the last step went in log-SNR, and its unconditional answer
    for sigma, down in pairs(sigmas):
        x0, negative = denoise(x, sigma), unconditional(x, sigma)
        if down == 0:
            return x0
        if idle(sigma, down):
            continue
        below, grow, up = split(process, sigma, down, eta)
        if old is None or below == 0:
            eps = (x - process.alpha(sigma) * negative) / sigma
            x = grow * (process.alpha(below) * x0 + below * eps)
        else:
            way = leg(process, sigma, below)
            x = way.keep * (x + process.alpha(sigma) * (x0 - negative)) + way.weight(1) * negative
            x = grow * (x + way.weight(2) * (-way.z / old[0]) * (negative - old[1]))
        if up > 0:
            x = x + up * noise()
        length = process.log_snr(below) - process.log_snr(sigma) if below > 0 else math.inf
        old = (length, negative) if math.isfinite(length) else None
    return x
