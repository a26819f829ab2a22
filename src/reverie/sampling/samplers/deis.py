"""DEIS, the diffusion exponential integrator."""

import math
from functools import reduce
from operator import add
from typing import Literal

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import FEW_STEPS, History, idle, interpolated, leg, lowered, noise_leg, one_of
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("deis", "k_deis", order=2, source="Zhang & Chen 2023, Fast sampling with exponential integrator, log-rho",
         label="DEIS", diffusers="DEISMultistepScheduler", whole_timesteps=True, extra_point=True, unit_start=True,
         options=("order", "lower_order_final"), flow=True)  # fmt: skip
def deis(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    order: Literal[1, 2, 3] = 2,
    lower_order_final: bool | None = None,
) -> Tensor:
    """Integrate exactly the polynomial in log(sigma / alpha) through the last predicted noises; first order to 0.

    Args:
        order: combine at most so many answers; 1 is DDIM.
        lower_order_final: the last two steps are of order 2 and 1; if None, where there are fewer than 15 steps.

    Raises:
        RequestError: an option that is none of these.
    """
    one_of("order", order, (1, 2, 3))
    steps = pairs(sigmas)
    low = len(steps) < FEW_STEPS if lower_order_final is None else lower_order_final
    history: History = []
    for step, (sigma, down) in enumerate(steps):
        x0, lam = denoise(x, sigma), process.log_snr(sigma)
        if down == 0:
            return x0
        if idle(sigma, down):
            continue
        if math.isinf(lam):  # pure noise: no clock to interpolate in
            x = leg(process, sigma, down).first_order(x, x0)
            continue
        history = [(lam, (x - process.alpha(sigma) * x0) / sigma), *history]
        used = history[: lowered(order, len(history), len(steps) - step, low)]
        history = history[:order]
        weights = interpolated([node for node, _ in used], lam, process.log_snr(down), rate=-1)
        integral = reduce(add, (weight * eps for weight, (_, eps) in zip(weights, used, strict=True)))
        x = noise_leg(process, sigma, down).keep * x - down * integral
    return x
