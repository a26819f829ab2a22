"""DPM-Solver++(2S)."""

import math
from typing import Literal

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import Leg, SolverType, leg, one_of, within
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("dpmpp_2s", "k_dpmpp_2s", "dpm++2s", order=2, source="Lu et al. 2022, DPM-Solver++, algorithm 1",
         diffusers="DPMSolverSinglestepScheduler", whole_timesteps=True, extra_point=True, unit_start=True,
         options=("order", "solver_type", "lower_order_final"), flow=True)  # fmt: skip
def dpmpp_2s(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    order: Literal[1, 2, 3] = 2,
    solver_type: SolverType = "midpoint",
    lower_order_final: bool = False,
    eta: float = 0.0,
) -> Tensor:
    """Blocks of `order` visited sigmas: every answer extends the step that began at the block's first sigma.

    Args:
        order: sigmas in a block.
        solver_type: how a step from two or three answers weighs their differences; for three, `midpoint` takes the
            newest alone.
        lower_order_final: the last sigma begins a block of its own; it always does before 0.
        eta: stochasticity: 0 the ODE, 1 diffusers' `sde-dpmsolver++`.

    Raises:
        RequestError: an option that is none of these.
    """
    one_of("order", order, (1, 2, 3))
    one_of("solver_type", solver_type, ("midpoint", "heun"))
    within("eta", eta, 0, 100)
    steps = pairs(sigmas)
    places = [step % order + 1 for step in range(len(steps))]
    if (lower_order_final and places[-1] == order) or steps[-1][1] == 0:
        places[-1] = 1
    origin, first, block = x, float(sigmas[0]), list[tuple[float, Tensor]]()
    for (sigma, down), place in zip(steps, places, strict=True):
        x0, lam = denoise(x, sigma), process.log_snr(sigma)
        if down == 0:
            return x0
        if place == 1 or not block:
            origin, first, block = x, sigma, []
        way = leg(process, first, down, eta)
        if math.isinf(lam):  # pure noise: no clock to interpolate in, so the next sigma begins a block
            x = way.first_order(origin, x0)
        else:
            if not block or lam - block[-1][0] > 1e-6:  # a step of no length has nothing new to say
                block.append((lam, x0))
            x = way.keep * origin + _integral(way, block, process.log_snr(down) - block[0][0], solver_type)
        if way.noise > 0:
            x = x + way.noise * noise()
    return x


def _integral(way: Leg, block: list[tuple[float, Tensor]], h: float, solver_type: SolverType) -> Tensor:
    """From the block's first answer and the slopes from it to the others (Lu et al. 2022, DPM-Solver, appendix)."""
    (lam, answer), *others = block
    ratios = [(other - lam) / h for other, _ in others]
    slopes = [(later - answer) / ratio for (_, later), ratio in zip(others, ratios, strict=True)]
    total = way.weight(1) * answer
    if len(slopes) == 1:
        weight = way.weight(1) / 2 if solver_type == "midpoint" else way.weight(2)
        return total + weight * slopes[0]
    if len(slopes) == 2 and solver_type == "midpoint":
        return total + way.weight(2) * slopes[1]
    if len(slopes) == 2:
        bend = (slopes[1] - slopes[0]) / (ratios[1] - ratios[0])
        return total + way.weight(2) * (slopes[0] - ratios[0] * bend) + way.weight(3) * 2 * bend
    return total
