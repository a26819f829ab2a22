"""DPM-Solver-2 steps with fresh noise."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs, slope, split
from reverie.types import Denoise, Noise


@sampler("dpm_2_a", "dpm_2_ancestral", "k_dpm_2_a", "k_dpm_2_ancestral", "kdpm_2_a", order=0,
         source="k-diffusion sample_dpm_2_ancestral; noise as in Song et al. 2021 (DDIM), equation 16, eta 1",
         options=("eta", "s_noise"), label="DPM2 a", spacing="karras", discards=("a1111", "comfy"),
         diffusers="KDPM2AncestralDiscreteScheduler", evaluations=lambda n: 2 * n - 1, flow=True)  # fmt: skip
def dpm_2_a(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """A step of dpm_2 below the next sigma, then noise up to it; the step to 0 is Euler's."""
    for sigma, down in pairs(sigmas):
        target, keep, up = split(process, sigma, down, eta)
        d = slope(denoise, x, sigma)
        if target > 0:
            middle = math.sqrt(sigma * target)
            d = slope(denoise, x + (middle - sigma) * d, middle)
        x = x + (target - sigma) * d
        if target > 0:
            x = keep * x + s_noise * up * noise()
    return x
