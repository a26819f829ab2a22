"""The reverse chain of DDPM."""

from torch import Tensor

from reverie.diffusion.process import Process
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("ddpm", order=0, source="Ho et al. 2020, algorithm 2, with the posterior's variance",
         label="DDPM", diffusers="DDPMScheduler", whole_timesteps=True, unit_start=True)  # fmt: skip
def ddpm(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise, process: Process) -> Tensor:
    """Sample q(x_s | x_t, x0) with the predicted x0."""
    for sigma, down in pairs(sigmas):
        x, deviation = process.posterior(denoise(x, sigma), x, sigma, down)
        if down > 0:
            x = x + deviation * noise()
    return x
