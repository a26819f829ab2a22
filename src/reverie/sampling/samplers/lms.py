"""Linear multistep (Adams-Bashforth with the step sizes as they are)."""

import math
from collections.abc import Sequence

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.errors import RequestError
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs, slope
from reverie.types import Denoise, Noise

MOST = 4  # slopes: their polynomial is a cubic, which two Gauss points integrate exactly


def coefficients(history: Sequence[float], start: float, end: float) -> list[float]:
    """Integral from `start` to `end` of each Lagrange basis polynomial over the nodes `history`, four at most."""
    middle, half = (start + end) / 2, (end - start) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))
    return [half * sum(_basis(history, j, t) for t in points) for j in range(len(history))]


def _basis(nodes: Sequence[float], j: int, t: float) -> float:
    return math.prod((t - node) / (nodes[j] - node) for k, node in enumerate(nodes) if k != j)


@sampler("lms", "k_lms", order=2, source="k-diffusion sample_lms; Adams-Bashforth of order 4 on unequal steps",
         label="LMS", diffusers="LMSDiscreteScheduler", options=("order", "denoise_final"), flow=True)  # fmt: skip
def lms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    order: int = MOST,
    denoise_final: bool = False,
) -> Tensor:
    """Integrate the polynomial through the last four slopes: order 4, once there are four.

    The first step is Euler's, whose error remains: order 2 in all.

    Args:
        order: how many slopes, 1 to 4.
        denoise_final: the step to 0 is Euler's, whose result is the last answer (ComfyUI).
    """
    if not 1 <= order <= MOST:
        raise RequestError(f"order of lms is {order}; it can be 1 to {MOST}")
    nodes: list[float] = []
    slopes: list[Tensor] = []
    for sigma, down in pairs(sigmas):
        d = slope(denoise, x, sigma)
        if down == sigma:  # a step of no length; its node would be there twice
            continue
        kept = 1 if denoise_final and down == 0 else order
        slopes = [d, *slopes][:kept]
        nodes = [sigma, *nodes][:kept]
        for weight, known in zip(coefficients(nodes, sigma, down), slopes, strict=True):
            x = x + weight * known
    return x
