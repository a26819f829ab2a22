"""Improved PNDM with the step sizes as they are."""

from functools import reduce
from operator import add
from typing import Literal

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import idle, one_of
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("ipndm_v", order=2, source="Zhang & Chen 2023, iPNDM; weights of diff-solvers (Zhou et al. 2024)",
         label="IPNDM_V", options=("order",), flow=True)  # fmt: skip
def ipndm_v(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    order: Literal[1, 2, 3, 4] = 4,
) -> Tensor:
    """Euler steps along a slope extrapolated from up to four at unequal distances; the step to 0 is Euler's.

    The weights are the published ones, which ComfyUI uses too. They differ from those of Adams-Bashforth (see
    `weights`), which are the sampler `lms`: order 2 where sigma is smooth in the step number.

    Args:
        order: combine at most so many slopes.

    Raises:
        RequestError: an option that is none of these.
    """
    one_of("order", order, (1, 2, 3, 4))
    slopes: list[Tensor] = []
    lengths: list[float] = []
    for sigma, down in pairs(sigmas):
        x0 = denoise(x, sigma)
        if down == 0:
            return x0
        if idle(sigma, down):
            continue
        slopes, lengths = [(x - x0) / sigma, *slopes][:order], [down - sigma, *lengths][:order]
        slope = reduce(add, (w * d for w, d in zip(weights(lengths), slopes, strict=True)))
        x = x + lengths[0] * slope
    return x


def weights(lengths: list[float]) -> list[float]:
    """Weights of the slopes, newest first, for the lengths of this step and of the steps between the slopes.

    Adams-Bashforth adds to the newest slope multiples of the first, second and third divided difference. As published,
    a bracket in the second closes late, (1 - a b) for (1 - a) b, the third adds a term that should be taken away, and
    the oldest weight has the ratio of the two newer lengths for that of the two older.
    """
    w, (h, *past) = [1.0, 0.0, 0.0, 0.0], lengths
    if past:
        first = h / (2 * past[0])
        w[0], w[1] = w[0] + first, w[1] - first
    if len(past) > 1:
        h1, h2 = past[:2]
        third, ratio = h / (3 * (h + h1)), h1 / h2
        second = (1 - third * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
        w[0], w[1], w[2] = w[0] + second, w[1] - (1 + ratio) * second, ratio * second
    if len(past) > 2:
        h3 = past[2]
        reach, span = h + h1 + h2, h1 * (h1 + h2)
        last = (1 - third) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * reach)
        last *= h * (h + h1) * reach / (span * (h1 + h2 + h3))
        far = span / (h2 * (h2 + h3))
        w[0], w[1] = w[0] + last, w[1] - (1 + ratio + far) * last
        w[2], w[3] = w[2] + (ratio + far * (1 + h2 / h3)) * last, -far * ratio * last
    return w[: len(lengths)]
