"""DPM-Solver++(2M) with CFG++."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import idle, leg
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("dpmpp_2m_cfg_pp", order=2, unconditional=True, flow=True,
         source="Chung et al. 2024, CFG++, on Lu et al. 2022, DPM-Solver++, algorithm 2, as in ComfyUI")  # fmt: skip
def dpmpp_2m_cfg_pp(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise, process: AnyProcess, unconditional: Denoise
) -> Tensor:
    """`euler_cfg_pp` plus the second-order term, the guided answer less the last unconditional one; same scales.

    Args:
        unconditional: x0 of the negative prompt alone, where `denoise` was last asked.
    """
    old: tuple[float, Tensor] | None = None
    for sigma, down in pairs(sigmas):
        x0, negative, lam = denoise(x, sigma), unconditional(x, sigma), process.log_snr(sigma)
        if down == 0:
            return x0
        if idle(sigma, down):
            continue
        step = process.alpha(down) * x0 + (down / sigma) * (x - process.alpha(sigma) * negative)
        if old is not None:
            r = (lam - old[0]) / (process.log_snr(down) - lam)
            step = step + leg(process, sigma, down).weight(1) / (2 * r) * (x0 - old[1])
        old = (lam, negative) if math.isfinite(lam) else None  # pure noise: no clock to interpolate in
        x = step
    return x
