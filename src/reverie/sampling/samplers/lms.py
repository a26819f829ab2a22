"""Linear multistep (Adams-Bashforth with the step sizes as they are)."""

from collections.abc import Sequence

from numpy.polynomial import Polynomial
from torch import Tensor

from reverie.diffusion.process import Process
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise

ORDER = 4


def coefficients(history: Sequence[float], start: float, end: float) -> list[float]:
    """Integral from `start` to `end` of each Lagrange basis polynomial over the nodes `history`."""
    weights = []
    for j, node in enumerate(history):
        others = [other for k, other in enumerate(history) if k != j]
        basis = Polynomial([1.0])
        for other in others:
            basis *= Polynomial([start - other, 1.0]) / (node - other)  # in t - start: no cancellation for small steps
        weights.append(float(basis.integ()(end - start)))
    return weights


@sampler("lms", "k_lms", order=2, source="k-diffusion sample_lms; Adams-Bashforth of order 4 on unequal steps",
         label="LMS", diffusers="LMSDiscreteScheduler")  # fmt: skip
def lms(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise, process: Process) -> Tensor:
    """Integrate the polynomial through the last four slopes: order 4, once there are four.

    The first step is Euler's, whose error remains: order 2 in all.
    """
    nodes: list[float] = []
    slopes: list[Tensor] = []
    for sigma, down in pairs(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        if down == sigma:  # a step of no length; its node would be there twice
            continue
        slopes = [slope, *slopes][:ORDER]
        nodes = [sigma, *nodes][:ORDER]
        for weight, known in zip(coefficients(nodes, sigma, down), slopes, strict=True):
            x = x + weight * known
    return x
