"""DPM-Solver++(2S) steps with fresh noise."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs, split
from reverie.types import Denoise, Noise


@sampler("dpmpp_2s_a", "dpmpp_2s_ancestral", "k_dpmpp_2s_a", "k_dpmpp_2s_ancestral", "dpm++2s_a", order=0,
         source="Lu et al. 2022, DPM-Solver++, algorithm 1 (r 1/2); noise as in k-diffusion sample_dpmpp_2s_ancestral",
         options=("eta", "s_noise"), label="DPM++ 2S a", spacing="karras", evaluations=lambda n: 2 * n - 1,
         flow=True)  # fmt: skip
def dpmpp_2s_a(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """The answer half-way in log sigma decides a step below the next sigma; then noise up to it."""
    for sigma, down in pairs(sigmas):
        target, keep, up = split(process, sigma, down, eta)
        x0 = denoise(x, sigma)
        if target > 0:
            middle = math.sqrt(sigma * target)
            x0 = denoise(x0 + (middle / sigma) * (x - x0), middle)
        x = x0 + (target / sigma) * (x - x0)
        if down > 0:
            x = keep * x + s_noise * up * noise()
    return x
