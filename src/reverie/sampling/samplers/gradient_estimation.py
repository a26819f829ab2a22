"""Gradient estimation: Euler steps along a direction corrected by the last one."""

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("gradient_estimation", "euler_ge", order=1, options=("ge_gamma",), flow=True,
         source="Permenter & Yuan 2024, Interpreting and Improving Diffusion Models, algorithm 2")  # fmt: skip
def gradient_estimation(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    ge_gamma: float = 2.0,
) -> Tensor:
    """Euler steps along `gamma d - (gamma - 1) d_before`; the first and the one to 0 are Euler's alone.

    Args:
        ge_gamma: 1 is Euler's method, 1.5 on equal steps Adams-Bashforth of order 2.
    """
    old: Tensor | None = None
    for sigma, down in pairs(sigmas):
        x0 = denoise(x, sigma)
        if down == 0:
            return x0
        d = (x - x0) / sigma
        estimate = d if old is None else ge_gamma * d + (1 - ge_gamma) * old
        x = x + (down - sigma) * estimate
        old = d
    return x
