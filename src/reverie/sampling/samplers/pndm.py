"""Pseudo linear multistep (PLMS), the default of the first Stable Diffusion release."""

from functools import reduce
from operator import add
from typing import Literal

from torch import Tensor

from reverie.diffusion.process import Process
from reverie.sampling.registry import sampler
from reverie.sampling.steps import landing, pairs, relabelled
from reverie.types import Denoise, Noise

# Adams-Bashforth on equal steps, newest first (Liu et al. 2022, equation 12; lower orders to begin with).
WEIGHTS = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}

Quantity = Literal["epsilon", "v_prediction"]


@sampler("pndm", "plms", order=2, source="Liu et al. 2022, equations 11 and 12, without Runge-Kutta warm-up",
         label="PLMS", diffusers="PNDMScheduler", evaluations=lambda n: n + 1 if n > 1 else 1, whole_timesteps=True,
         unit_start=True, fixed_stride=True)  # fmt: skip
def pndm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: Process,
    stride: int | None = None,
    quantity: Quantity = "epsilon",
    skip: bool = False,
) -> Tensor:
    """DDIM steps along a direction extrapolated from up to four answers; the first step is done twice, as Heun's.

    The weights assume equal steps: order 2 where sigma is smooth in the step number (every spacing), else 1.

    Args:
        stride: land this many timesteps below instead of at the next visited sigma, as diffusers does.
        quantity: what is extrapolated: the noise (the paper), or v for models that say v (diffusers).
        skip: take what the doubled first step gave to be one level further down. diffusers does so where its image to
            image pipeline enters the table of timesteps behind the one that stands there twice.
    """
    (sigma, visited), *steps = pairs(sigmas)
    final = float(sigmas[-1])
    first = _answer(denoise, x, sigma, process, quantity)
    down = landing(process, sigma, visited, stride, final)
    ahead = relabelled(_move(x, sigma, down, first, process, quantity), process, down, visited)
    if not steps:
        return ahead
    mean = (_answer(denoise, ahead, visited, process, quantity) + first) / 2
    start = sigma if stride is None else process.sigma(round(process.timestep(visited)) + stride)
    x = _move(relabelled(x, process, sigma, start), start, visited, mean, process, quantity)
    history = [first]
    if skip:
        further = steps[0][1]
        x, steps = relabelled(x, process, visited, further), steps[1:]
    for sigma, visited in steps:
        history = [_answer(denoise, x, sigma, process, quantity), *history][:4]
        direction = reduce(add, (w * h for w, h in zip(WEIGHTS[len(history)], history, strict=True)))
        down = landing(process, sigma, visited, stride, final)
        x = relabelled(_move(x, sigma, down, direction, process, quantity), process, down, visited)
    return x


def _answer(denoise: Denoise, x: Tensor, sigma: float, process: Process, quantity: Quantity) -> Tensor:
    x0 = denoise(x, sigma)
    eps = (x - x0) / sigma
    return eps if quantity == "epsilon" else (eps - sigma * x0) / process.scale(sigma)


def _move(x: Tensor, sigma: float, down: float, direction: Tensor, process: Process, quantity: Quantity) -> Tensor:
    """A DDIM step; v is first turned into the noise it means for this `x`."""
    if quantity == "v_prediction":
        scale = process.scale(sigma)
        direction = direction / scale + x * (sigma / scale**2)
    return x + (down - sigma) * direction
