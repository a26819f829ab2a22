"""Improved PNDM: Adams-Bashforth on steps taken as equal."""

from functools import reduce
from operator import add
from typing import Literal

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import one_of
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise

# Adams-Bashforth on equal steps, newest first, by order.
WEIGHTS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@sampler("ipndm", order=2, source="Zhang & Chen 2023, iPNDM; Liu et al. 2022, equation 12", label="IPNDM",
         diffusers="IPNDMScheduler(trained_betas)", options=("order", "euler_at_final"), flow=True)  # fmt: skip
def ipndm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    order: Literal[1, 2, 3, 4] = 4,
    euler_at_final: bool = True,
) -> Tensor:
    """Euler steps along a slope extrapolated from up to four.

    The weights assume equal steps, and the first step is Euler's: order 2 where sigma is smooth in the step number.

    Args:
        order: combine at most so many slopes.
        euler_at_final: the step to 0 is Euler's (ComfyUI); diffusers extrapolates there too.

    Raises:
        RequestError: an option that is none of these.
    """
    one_of("order", order, (1, 2, 3, 4))
    slopes: list[Tensor] = []
    for sigma, down in pairs(sigmas):
        x0 = denoise(x, sigma)
        slopes = [(x - x0) / sigma, *slopes][:order]
        if down == 0 and euler_at_final:
            return x0
        slope = reduce(add, (w * d for w, d in zip(WEIGHTS[len(slopes)], slopes, strict=True)))
        x = x + (down - sigma) * slope
    return x
