"""SA-Solver, the stochastic Adams method."""

import math
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Literal

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import History, Leg, idle, interpolated, leg, one_of, within
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise

Order = Literal[1, 2, 3, 4]
OPTIONS = ("predictor_order", "corrector_order", "simplified", "lower_order_final", "tau", "tau_start", "tau_end")


@sampler("sa_solver", order=0, source="Xue et al. 2023, algorithm 1", diffusers="SASolverScheduler",
         whole_timesteps=True, extra_point=True, unit_start=True, options=OPTIONS, flow=True)  # fmt: skip
def sa_solver(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    predictor_order: Order = 2,
    corrector_order: Order = 2,
    simplified: bool = True,
    lower_order_final: bool = True,
    tau: float = 1.0,
    tau_start: float = 800,
    tau_end: float = 200,
    tau_of: Callable[[float], float] | None = None,
) -> Tensor:
    """Adams-Bashforth to predict and Adams-Moulton to correct, on the diffusion SDE; the answer is not asked again.

    The defaults are diffusers'. ComfyUI's sa_solver has orders 3 and 4, is not simplified, reads tau where a step ends,
    and draws noise only where tau is not 0.

    Args:
        predictor_order, corrector_order: combine at most so many answers.
        simplified: rules of two answers are those of the paper's appendix D, for few steps.
        lower_order_final: the last steps are of lower order, however many steps there are.
        tau: stochasticity between the timesteps `tau_start` and `tau_end`, both included; elsewhere 0, the ODE.
        tau_of: stochasticity by timestep, instead of the interval.

    Raises:
        RequestError: an option out of range.
    """
    if tau_of is None:
        tau_of = interval(tau, tau_start, tau_end)
    return stochastic_adams(
        denoise, x, sigmas, noise=noise, process=process, orders=(predictor_order, corrector_order),
        simplified=simplified, lower_order_final=lower_order_final, tau_of=tau_of, evaluate_again=False,
    )  # fmt: skip


def interval(tau: float, start: float, end: float) -> Callable[[float], float]:
    """`tau` for timesteps from `start` down to `end`, else 0."""
    within("tau", tau, 0, 10)
    return lambda timestep: tau if start >= timestep >= end else 0.0


def stochastic_adams(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    orders: tuple[int, int],
    simplified: bool,
    lower_order_final: bool,
    tau_of: Callable[[float], float],
    evaluate_again: bool,
) -> Tensor:
    """The predictor-corrector loop (PEC; PECE where `evaluate_again`); see `sa_solver` for the arguments.

    Every step draws noise, used or not, as diffusers does: the stream does not depend on tau.
    """
    for option, order in zip(("predictor_order", "corrector_order"), orders, strict=True):
        one_of(option, order, (1, 2, 3, 4))
    steps = pairs(sigmas)
    count = len(steps) - (steps[-1][1] == 0)  # the step to 0 is x0 itself
    history: History = []
    predicted: tuple[Tensor, Leg, float, float] | None = None  # the last step: kept, way, start, rate
    for step, (sigma, down) in enumerate(steps):
        x0, lam = denoise(x, sigma), process.log_snr(sigma)
        if predicted is not None:
            kept, way, before, rate = predicted
            most = min(orders[1], len(history) + 1, count - step + 2 if lower_order_final else orders[1])
            x = kept + _adams(way, [(lam, x0), *history][:most], before, lam, rate, simplified)
            if evaluate_again:
                x0 = denoise(x, sigma)
        if down == 0:
            return x0
        if idle(sigma, down):
            predicted = None
            continue
        tau = tau_of(round(process.timestep(sigma)))
        way, rate = leg(process, sigma, down, tau**2), 1 + tau**2
        kept = way.keep * x + way.noise * noise()
        if math.isinf(lam):  # pure noise: no clock to interpolate in
            x, predicted = kept + way.weight(1) * x0, None
            continue
        history = [(lam, x0), *history][: max(orders[0], orders[1] - 1)]
        most = min(orders[0], len(history), count - step if lower_order_final else orders[0])
        predicted = (kept, way, lam, rate)
        x = kept + _adams(way, history[:most], lam, process.log_snr(down), rate, simplified)
    return x


def _adams(way: Leg, used: History, start: float, end: float, rate: float, simplified: bool) -> Tensor:
    """The integral of the polynomial through the answers `used` (Xue et al. 2023, equations 15 and 18)."""
    nodes = [node for node, _ in used]
    if simplified and len(nodes) == 2:  # the line's first moment without the exponential: h² / 2
        slope = rate * (end - start) ** 2 / 2 / (nodes[0] - nodes[1])
        weights = [slope, -slope]
        weights[nodes.index(start)] -= math.expm1(-rate * (end - start))
    else:
        weights = [rate * weight for weight in interpolated(nodes, start, end, rate)]
    return reduce(add, (-way.scale * weight * answer for weight, (_, answer) in zip(weights, used, strict=True)))
