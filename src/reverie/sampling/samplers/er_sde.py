"""Extended reverse-time SDE solver."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import idle
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise

POINTS = 200  # of the numerical integrals (the authors' code)


@sampler("er_sde", order=0, source="Cui et al. 2023, Elucidating the Solution Space of Extended Reverse-Time SDE, "
         "algorithms 1 to 3 with the noise scale of ER SDE 5", options=("s_noise", "max_stage"), flow=True)  # fmt: skip
def er_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    s_noise: float = 1.0,
    max_stage: int = 3,
) -> Tensor:
    """Taylor expansion of the answer in `lambda = sigma / alpha` around the newest, with differences for derivatives.

    Args:
        max_stage: terms of the expansion, 1 to 3.
    """
    history: list[tuple[float, list[Tensor]]] = []  # lambda, the answer and its derivative there
    for sigma, down in pairs(sigmas):
        x0 = denoise(x, sigma)
        if down == 0:
            return x0
        if idle(sigma, down):
            continue
        alpha, alpha_t = process.alpha(sigma), process.alpha(down)
        s, t = sigma / alpha if alpha else math.inf, down / alpha_t
        ratio = _relative_scale(t) / _relative_scale(s)
        x = (down / sigma) * ratio * x + alpha_t * (1 - t * ratio / s) * x0
        terms = [x0]
        if history and max_stage > 1:
            terms.append((x0 - history[0][1][0]) / (s - history[0][0]))
            x = x + alpha_t * _weight(1, s, t) * terms[1]
        if len(history) > 1 and max_stage > 2:
            second = (terms[1] - history[0][1][1]) / ((s - history[1][0]) / 2)
            x = x + alpha_t * _weight(2, s, t) * second
        x = x + s_noise * down * math.sqrt(1 - ratio**2) * noise()
        if math.isfinite(s):  # pure noise has no place in the expansion
            history = [(s, terms), *history][:2]
    return x


def _relative_scale(level: float) -> float:
    """`phi(lambda) / lambda` of the noise scale function `phi = lambda (exp(lambda^0.3) + 10)`."""
    return math.exp(level**0.3) + 10


def _weight(k: int, s: float, t: float) -> float:
    """`(t - s)^k / k! + phi(t) ∫ (lambda - s)^(k-1) / phi(lambda) dlambda` from t to s, by left rectangles."""
    width = (s - t) / POINTS
    places = [t + i * width for i in range(POINTS)]
    integral = width * sum((p - s) ** (k - 1) / (p * _relative_scale(p)) for p in places)
    return (t - s) ** k / math.factorial(k) + t * _relative_scale(t) * integral
