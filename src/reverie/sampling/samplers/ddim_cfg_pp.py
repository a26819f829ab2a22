"""DDIM with CFG++, on AUTOMATIC1111's scale."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.registry import sampler
from reverie.sampling.steps import ancestral, pairs
from reverie.types import Denoise, Noise


@sampler("ddim_cfg_pp", "ddim_cfgpp", order=1, source="Chung et al. 2024, CFG++, algorithm 2; scale of AUTOMATIC1111",
         label="DDIM CFG++", unconditional=True, whole_timesteps=True, unit_start=True,
         options=("eta", "strength"), flow=True)  # fmt: skip
def ddim_cfg_pp(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    unconditional: Denoise,
    eta: float = 0.0,
    strength: float = 1 / 12.5,
) -> Tensor:
    """DDIM with x0 from the guided answer and the direction from the unconditional one.

    Args:
        unconditional: x0 of the negative prompt alone, where `denoise` was last asked.
        eta: share of the DDPM noise that is fresh, from 0 to 1.
        strength: the guidance scale is multiplied by it: AUTOMATIC1111 brings scales from 0 to 12.5 to the paper's
            0 to 1, so that the usual scales can be used.
    """
    for sigma, down in pairs(sigmas):
        guided = denoise(x, sigma)
        negative = unconditional(x, sigma)
        x0 = negative + strength * (guided - negative)  # guidance is linear in its scale
        eps = (x - process.alpha(sigma) * negative) / sigma
        alpha = process.alpha(down)
        below, up = ancestral(math.exp(-process.log_snr(sigma)), down / alpha, eta)
        x = alpha * (x0 + below * eps)
        if up > 0:
            x = x + (alpha * up) * noise()
    return x
