"""Euler's method on the probability-flow ODE."""

from torch import Tensor

from reverie.diffusion.process import Process
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("euler", "k_euler", order=1, source="Karras et al. 2022, algorithm 2 without churn",
         label="Euler", diffusers="EulerDiscreteScheduler")  # fmt: skip
def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise, process: Process) -> Tensor:
    """`dx/dsigma = (x - x0) / sigma`, one evaluation a step."""
    for sigma, down in pairs(sigmas):
        d = (x - denoise(x, sigma)) / sigma
        x = x + (down - sigma) * d
    return x
