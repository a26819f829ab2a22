"""The beta distribution against SciPy."""

import pytest
import torch
from scipy import stats

from reverie.diffusion.distributions import beta_quantile

PARAMETERS = (0.1, 0.5, 0.6, 1.0, 2.0, 10.0)


@pytest.mark.parametrize("alpha", PARAMETERS)
@pytest.mark.parametrize("beta", PARAMETERS)
def test_quantiles_equal_scipy(alpha: float, beta: float) -> None:
    p = torch.linspace(0, 1, 301, dtype=torch.float64)
    want = torch.tensor(stats.beta.ppf(p.numpy(), alpha, beta))
    torch.testing.assert_close(beta_quantile(p, alpha, beta), want, rtol=0, atol=1e-10)


def test_small_quantiles_keep_their_digits() -> None:
    p = torch.tensor([1e-12, 1e-6, 1e-3], dtype=torch.float64)
    want = torch.tensor(stats.beta.ppf(p.numpy(), 0.6, 0.6))
    torch.testing.assert_close(beta_quantile(p, 0.6, 0.6), want, rtol=1e-9, atol=0)


def test_uniform_and_arcsine_distributions_in_closed_form() -> None:
    p = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(beta_quantile(p, 1.0, 1.0), p)
    torch.testing.assert_close(beta_quantile(p, 0.5, 0.5), torch.sin(torch.pi * p / 2) ** 2)
