"""Heun's method on the probability-flow ODE."""

from torch import Tensor

from reverie.diffusion.process import Process
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("heun", "k_heun", order=2, source="Karras et al. 2022, algorithm 1",
         label="Heun", diffusers="HeunDiscreteScheduler", evaluations=lambda n: 2 * n - 1)  # fmt: skip
def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise, process: Process) -> Tensor:
    """An Euler step, then the average of the slopes at both ends; the step to 0 is Euler's alone."""
    for sigma, down in pairs(sigmas):
        d = (x - denoise(x, sigma)) / sigma
        euler = x + (down - sigma) * d
        if down > 0:
            d = (d + (euler - denoise(euler, down)) / down) / 2
            euler = x + (down - sigma) * d
        x = euler
    return x
