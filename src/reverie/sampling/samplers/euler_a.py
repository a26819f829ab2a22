"""Euler steps with fresh noise."""

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs, slope, split
from reverie.types import Denoise, Noise


@sampler("euler_a", "euler_ancestral", "k_euler_a", "k_euler_ancestral", order=0, options=("eta", "s_noise"),
         source="k-diffusion sample_euler_ancestral; noise as in Song et al. 2021 (DDIM), equation 16, eta 1",
         label="Euler a", diffusers="EulerAncestralDiscreteScheduler", flow=True)  # fmt: skip
def euler_a(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Step below the next sigma, then add noise up to it; `eta` 0 is Euler's method."""
    for sigma, down in pairs(sigmas):
        target, keep, up = split(process, sigma, down, eta)
        x = x + (target - sigma) * slope(denoise, x, sigma)
        if down > 0:
            x = keep * x + s_noise * up * noise()
    return x
