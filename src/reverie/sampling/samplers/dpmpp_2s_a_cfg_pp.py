"""DPM-Solver++(2S) with fresh noise and CFG++."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import idle, leg, sigma_at
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs, split
from reverie.types import Denoise, Noise


@sampler("dpmpp_2s_a_cfg_pp", "dpmpp_2s_ancestral_cfg_pp", order=0, evaluations=lambda n: 2 * n - 1,
         unconditional=True, options=("eta",), flow=True,
         source="Chung et al. 2024, CFG++, on k-diffusion's sample_dpmpp_2s_ancestral, as in ComfyUI")  # fmt: skip
def dpmpp_2s_a_cfg_pp(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    unconditional: Denoise,
    eta: float = 1.0,
) -> Tensor:
    """A step of order 2 along the unconditional answers, then fresh noise and the guidance of the step's start.

    The guidance scales are those of `euler_cfg_pp`.

    Args:
        unconditional: x0 of the negative prompt alone, where `denoise` was last asked.
        eta: share of fresh noise, from 0 to 1.
    """
    for sigma, down in pairs(sigmas):
        x0, negative = denoise(x, sigma), unconditional(x, sigma)
        below, grow, up = split(process, sigma, down, eta)
        guidance = process.alpha(down) * (x0 - negative)
        if below == 0:
            x = grow * negative
        else:
            lam, lam_next = process.log_snr(sigma), process.log_snr(below)
            if math.isfinite(lam) and not idle(sigma, below):  # pure noise has no middle in log-SNR
                middle = sigma_at(process, (lam + lam_next) / 2)
                halfway = leg(process, sigma, middle).first_order(x, negative)
                denoise(halfway, middle)
                negative = unconditional(halfway, middle)
            x = grow * leg(process, sigma, below).first_order(x, negative)
        if up > 0:
            x = x + up * noise()
        x = x + guidance
    return x
