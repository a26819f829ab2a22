"""Sampling of consistency models."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise

SIGMA_DATA = 0.5  # standard deviation of the data in the boundary condition (Luo et al. 2023; diffusers, LCMScheduler)


@sampler("lcm", order=0, source="Song et al. 2023, Consistency Models, algorithm 1; Luo et al. 2023, LCM, algorithm 3",
         label="LCM", diffusers="LCMScheduler", options=("timestep_scaling",), whole_timesteps=True, unit_start=True,
         flow=True)  # fmt: skip
def lcm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    timestep_scaling: float = 0.0,
) -> Tensor:
    """Predict x0, then noise it again to the next sigma.

    Args:
        timestep_scaling: the boundary condition's: a little of `x` is mixed into the answer, all of it at timestep 0.
            10 in diffusers and AUTOMATIC1111, where it changes a latent by less than 1e-4; 0 leaves it out (ComfyUI).
    """
    for sigma, down in pairs(sigmas):
        x0 = denoise(x, sigma)
        if timestep_scaling > 0:
            t = timestep_scaling * process.timestep(sigma)
            length = math.hypot(t, SIGMA_DATA)
            x0 = (t / length) * x0 + (SIGMA_DATA / length) ** 2 / process.scale(sigma) * x
        x = process.alpha(down) * x0 + down * noise() if down > 0 else x0
    return x
