"""Euler steps with fresh noise."""

from torch import Tensor

from reverie.diffusion.process import Process
from reverie.sampling.registry import sampler
from reverie.sampling.steps import ancestral, pairs
from reverie.types import Denoise, Noise


@sampler("euler_a", "euler_ancestral", "k_euler_a", "k_euler_ancestral", order=0,
         source="k-diffusion sample_euler_ancestral; noise as in Song et al. 2021 (DDIM), equation 16, eta 1",
         label="Euler a", diffusers="EulerAncestralDiscreteScheduler", options=("eta",))  # fmt: skip
def euler_a(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise, process: Process, eta: float = 1.0) -> Tensor:
    """Step below the next sigma, then add noise up to it."""
    for sigma, down in pairs(sigmas):
        target, up = ancestral(sigma, down, eta)
        d = (x - denoise(x, sigma)) / sigma
        x = x + (target - sigma) * d
        if down > 0:
            x = x + up * noise()
    return x
