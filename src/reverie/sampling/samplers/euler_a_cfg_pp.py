"""Euler steps with fresh noise and CFG++."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.registry import sampler
from reverie.sampling.steps import ancestral, pairs
from reverie.types import Denoise, Noise


@sampler("euler_a_cfg_pp", "euler_ancestral_cfg_pp", order=0, unconditional=True, options=("eta",),
         source="Chung et al. 2024, CFG++; noise as in Song et al. 2021 (DDIM), equation 16", flow=True)  # fmt: skip
def euler_a_cfg_pp(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    unconditional: Denoise,
    eta: float = 1.0,
) -> Tensor:
    """`euler_cfg_pp` to below the next sigma, then noise up to it; the same guidance scales.

    Args:
        unconditional: x0 of the negative prompt alone, where `denoise` was last asked.
        eta: share of fresh noise, from 0 to 1.
    """
    for sigma, down in pairs(sigmas):
        x0 = denoise(x, sigma)
        eps = (x - process.alpha(sigma) * unconditional(x, sigma)) / sigma
        alpha = process.alpha(down)
        below, up = ancestral(math.exp(-process.log_snr(sigma)), down / alpha, eta)
        x = alpha * (x0 + below * eps)
        if up > 0:
            x = x + (alpha * up) * noise()
    return x
