"""Exponential integrators: the linear part of the diffusion equation is solved exactly, the answers are interpolated.

In the clock lambda = log(alpha / sigma), with h = lambda_t - lambda_s, a step from s to t is

    x_t = sigma_t / sigma_s exp(-eta h) x_s + alpha_t (1 + eta) ∫ exp((1 + eta) (lambda - lambda_t)) x0(lambda) dlambda
          + sigma_t sqrt(1 - exp(-2 eta h)) noise

(Xue et al. 2023, SA-Solver, with eta = tau²; eta 0 is DPM-Solver++, Lu et al. 2022). Written with alpha, it holds for
variance-preserving models and rectified flow alike. DPM-Solver++, UniPC, SEEDS, SA-Solver and DEIS differ in how they
interpolate the answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from numpy.polynomial import Polynomial
from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.errors import RequestError
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise

# With fewer steps the last ones are of lower order, for stability (`lower_order_final` of Lu's code and of diffusers).
FEW_STEPS = 15

SolverType = Literal["midpoint", "heun"]
Quantity = Literal["sample", "epsilon"]
History = list[tuple[float, Tensor]]
"""`(lambda, answer)` of the steps so far, newest first."""


def one_of(option: str, value: object, allowed: Sequence[object]) -> None:
    """Check a sampler's option.

    Raises:
        RequestError: another value.
    """
    if value not in allowed:
        raise RequestError(f"sampler option {option} is {value!r}; it can be {', '.join(map(str, allowed))}")


def within(option: str, value: float, low: float, high: float) -> None:
    """Check a sampler's option, a number from `low` to `high`.

    Raises:
        RequestError: not a number, or out of range.
    """
    if not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"sampler option {option} is {value!r}; it can be a number from {low:g} to {high:g}")


def phi(k: int, z: float) -> float:
    """`phi_k(z) = sum z^n / (n + k)!`, so `phi_1(z) = (e^z - 1) / z` (Hochbruck & Ostermann 2010, section 2.1)."""
    if abs(z) < 1:  # the recursion below would cancel; 1 / 20! is below the precision of a float
        return sum(z**n / math.factorial(n + k) for n in range(20))
    value = math.exp(z)
    for j in range(k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def interpolated(nodes: Sequence[float], start: float, end: float, rate: float) -> list[float]:
    """`∫ exp(rate (t - end)) l_j(t) dt` from `start` to `end`, for each Lagrange polynomial l_j over `nodes`."""
    h = end - start
    moments = [math.factorial(k) * h ** (k + 1) * phi(k + 1, -rate * h) for k in range(len(nodes))]
    weights = []
    for j, node in enumerate(nodes):
        basis = Polynomial([1.0])
        for other in (other for k, other in enumerate(nodes) if k != j):
            basis *= Polynomial([start - other, 1.0]) / (node - other)  # in t - start: no cancellation for small steps
        weights.append(sum(c * m for c, m in zip(basis.coef.tolist(), moments, strict=True)))
    return weights


def sigma_at(process: AnyProcess, log_snr: float) -> float:
    """The noise level with `log(alpha / sigma) = log_snr`, for an alpha that is linear in sigma (as all have)."""
    ratio = math.exp(-log_snr)
    return ratio * process.alpha(0.0) / (1 + ratio * (process.alpha(0.0) - process.alpha(1.0)))


@dataclass(frozen=True)
class Leg:
    """The exact part of one step.

    Attributes:
        keep: factor of `x`.
        scale, z: `scale (e^z - 1)` is the weight of an answer that stays as it is.
        noise: standard deviation of the fresh noise.
    """

    keep: float
    scale: float
    z: float
    noise: float = 0.0

    def weight(self, k: int) -> float:
        """Weight of the (k-1)-th derivative of the answer, in units of the step: `scale z phi_k(z)`."""
        return self.scale * (math.expm1(self.z) if k == 1 else self.z * phi(k, self.z))

    def first_order(self, x: Tensor, answer: Tensor) -> Tensor:
        """The step with the answer held constant, without the noise; with eta 0 this is DDIM."""
        return self.keep * x + self.weight(1) * answer


def leg(process: AnyProcess, sigma: float, down: float, eta: float = 0.0) -> Leg:
    """The step from `sigma` to `down` > 0 in terms of x0; `sigma` may be pure noise (alpha 0)."""
    h = process.log_snr(down) - process.log_snr(sigma)
    decay = math.exp(-eta * h) if eta else 1.0
    noise = down * math.sqrt(max(-math.expm1(-2 * eta * h), 0.0)) if eta else 0.0
    return Leg(down / sigma * decay, -process.alpha(down), -(1 + eta) * h, noise)


def noise_leg(process: AnyProcess, sigma: float, down: float) -> Leg:
    """The step from `sigma`, where alpha > 0, to `down` > 0 in terms of the noise (Lu et al. 2022, DPM-Solver)."""
    h = process.log_snr(down) - process.log_snr(sigma)
    return Leg(process.alpha(down) / process.alpha(sigma), -down, h)


def idle(sigma: float, down: float) -> bool:
    """Whether a step has no length: timesteps rounded to one, or Karras' last sigma is already the final one.

    As two nodes of an interpolation such sigmas would magnify rounding; a millionth is a float32's.
    """
    return math.isclose(sigma, down, rel_tol=1e-6)


def lowered(order: int, known: int, left: int, lower_order_final: bool) -> int:
    """The order of this step: at most the answers known and, if asked, at most the steps left (1 for the last)."""
    return min(order, known, left) if lower_order_final else min(order, known)


def derivatives(history: History, h: float) -> list[Tensor]:
    """The newest answer and its first differences in lambda, in units of `h` (Lu et al. 2022, DPM-Solver++, B.4).

    Of up to three answers; as in Lu's code the last of three is half the second derivative.
    """
    (lam, answer), *older = history
    found = [answer]
    if older:
        ratio = (lam - older[0][0]) / h
        found.append((answer - older[0][1]) / ratio)
    if len(older) > 1:
        before = (older[0][0] - older[1][0]) / h
        second = (found[1] - (older[0][1] - older[1][1]) / before) / (ratio + before)
        found = [answer, found[1] + ratio * second, second]
    return found


def multistep(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    order: int,
    solver_type: SolverType,
    lower_order_final: bool | None,
    euler_at_final: bool,
    eta: float = 0.0,
    quantity: Quantity = "sample",
) -> Tensor:
    """DPM-Solver's multistep family, of which each sampler is one setting (Lu et al. 2022).

    Args:
        order: 1 to 3 answers are combined.
        solver_type: weight of the difference in steps of order 2: `midpoint` phi_1 / 2, `heun` phi_2.
        lower_order_final: the last steps are of lower order; if None, where there are fewer than 15.
        euler_at_final: the last step is of order 1.
        eta: stochasticity, 0 the ODE, 1 the SDE; only with quantity sample.
        quantity: what is integrated: x0 (DPM-Solver++) or the noise (DPM-Solver).

    Raises:
        RequestError: an option that is none of these.
    """
    one_of("order", order, (1, 2, 3))
    one_of("solver_type", solver_type, ("midpoint", "heun"))
    within("eta", eta, 0, 100)
    steps = pairs(sigmas)
    low = len(steps) < FEW_STEPS if lower_order_final is None else lower_order_final
    history: History = []
    for step, (sigma, down) in enumerate(steps):
        x0 = denoise(x, sigma)
        if down == 0:
            return x0
        if idle(sigma, down):
            continue
        lam, left = process.log_snr(sigma), len(steps) - step
        way = leg(process, sigma, down, eta)
        if math.isinf(lam):  # pure noise: no clock to interpolate in
            x = way.first_order(x, x0)
        else:
            answer = x0
            if quantity == "epsilon":
                answer, way = (x - process.alpha(sigma) * x0) / sigma, noise_leg(process, sigma, down)
            history = [(lam, answer), *history]
            now = 1 if euler_at_final and left == 1 else lowered(order, len(history), left, low)
            history = history[:order]
            x = way.keep * x + _combined(way, derivatives(history[:now], process.log_snr(down) - lam), solver_type)
        if way.noise > 0:
            x = x + way.noise * noise()
    return x


def _combined(way: Leg, found: list[Tensor], solver_type: SolverType) -> Tensor:
    """The integral, from the answer and its derivatives."""
    total = way.weight(1) * found[0]
    if len(found) == 2 and solver_type == "midpoint":
        return total + way.weight(1) / 2 * found[1]
    for k, derivative in enumerate(found[1:], 2):
        total = total + way.weight(k) * derivative
    return total
