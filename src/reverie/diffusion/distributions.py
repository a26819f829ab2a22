"""Quantiles of the beta distribution."""

import math

import torch
from torch import Tensor

TERMS = 70  # of a series in powers of at most 1/2, with coefficients that grow no faster than a polynomial
NEWTON = 40  # iterations; it converges in fewer than ten


def beta_quantile(p: Tensor, alpha: float, beta: float) -> Tensor:
    """The x in [0, 1] with `I_x(alpha, beta) = p`, the inverse of the regularised incomplete beta function.

    Accurate to 1e-10 for `alpha` and `beta` from 0.1 to 10.

    Args:
        p: `(n,)` float64 in [0, 1].

    Returns:
        `(n,)` float64.
    """
    half = torch.tensor([0.5], dtype=torch.float64)
    middle = float(_log_cdf(half.log(), alpha, beta).exp())
    below = _lower_tail(p.clamp(max=middle), alpha, beta)
    above = 1 - _lower_tail((1 - p).clamp(max=1 - middle), beta, alpha)  # the mirror image: x -> 1 - x
    return torch.where(p <= middle, below, above)


def _lower_tail(p: Tensor, alpha: float, beta: float) -> Tensor:
    """Newton's method on `log I` as a function of `log x <= log 1/2`: concave and nearly straight, of slope alpha."""
    target = p.log()
    log_x = (target - _log_cdf_factor(alpha, beta)).div(alpha).clamp(max=math.log(0.5))
    for _ in range(NEWTON):
        log_cdf = _log_cdf(log_x, alpha, beta)
        log_density = alpha * log_x + (beta - 1) * torch.log1p(-log_x.exp()) - _log_beta(alpha, beta)
        step = (log_cdf - target) / (log_density - log_cdf).exp()
        log_x = (log_x - step).clamp(max=math.log(0.5))
        if not bool((step.abs() > 1e-14).any()):
            break
    return torch.where(p > 0, log_x.exp(), torch.zeros_like(p))


def _log_cdf(log_x: Tensor, alpha: float, beta: float) -> Tensor:
    """`log I_x(alpha, beta)` for `x <= 1/2`, from the power series of the integrand (DLMF 8.17.7)."""
    x, total, coefficient = log_x.exp(), torch.ones_like(log_x), 1.0
    power = torch.ones_like(log_x)
    for k in range(1, TERMS):
        coefficient *= (k - beta) / k
        power = power * x
        total = total + coefficient * alpha / (alpha + k) * power
    return alpha * log_x + _log_cdf_factor(alpha, beta) + total.log()


def _log_cdf_factor(alpha: float, beta: float) -> float:
    """`log I_x(alpha, beta)` is `alpha log x` plus this for small x."""
    return -math.log(alpha) - _log_beta(alpha, beta)


def _log_beta(alpha: float, beta: float) -> float:
    return math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
