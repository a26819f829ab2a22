"""Distances against closed forms, SciPy's matrix root and plain loops."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from reverie.errors import RequestError
from reverie.evaluate.distances import fid, kid, precision_recall


def normal(n: int, width: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g, dtype=torch.float64)
    return mean + scale * torch.randn(n, width, generator=g, dtype=torch.float64) @ mix


def test_fid_is_that_of_the_matrix_root() -> None:
    a, b = normal(300, 16, 0), normal(200, 16, 1, mean=0.3)
    ca, cb = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = np.real(linalg.sqrtm(ca @ cb))
    expected = np.square(a.numpy().mean(0) - b.numpy().mean(0)).sum() + np.trace(ca + cb - 2 * root)
    assert fid(a, b) == pytest.approx(expected, rel=1e-8)


def test_fid_with_fewer_pictures_than_features() -> None:
    """Covariances are singular, which SciPy's root does not survive."""
    a = normal(20, 64, 0)
    assert fid(a, a.clone()) == pytest.approx(0, abs=1e-9)
    assert fid(a, a + 2) == pytest.approx(4 * 64, rel=1e-6)


def test_fid_of_scaled_gaussians() -> None:
    """N(sm, s²v) against N(tm, t²v) in one dimension: (s - t)² (m² + v)."""
    a = torch.randn(5_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert fid(2 * a, 5 * a) == pytest.approx(9 * float(a.var() + a.mean() ** 2), rel=1e-9)


def test_kid_is_unbiased_and_grows() -> None:
    """Over many pairs of samples of one distribution its mean is zero; it is not where one is moved."""
    g = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 60, 4, generator=g) for _ in range(60)]
    same = torch.tensor([kid(a, b).mean for a, b in pairs])
    assert abs(float(same.mean())) < 3 * float(same.std()) / math.sqrt(60)
    moved = [kid(a, b + 1).mean for a, b in pairs[:5]]
    assert min(moved) > 5 * float(same.std())


def test_kid_by_loops() -> None:
    a, b = normal(6, 3, 0), normal(6, 3, 1)

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    expected = sum(kernel(a[i], a[j]) + kernel(b[i], b[j]) for i, j in pairs) / 30
    expected -= 2 * sum(kernel(x, y) for x in a for y in b) / 36
    assert kid(a, b).mean == pytest.approx(expected, rel=1e-9)
    assert kid(a, b).deviation == pytest.approx(0, abs=1e-9)


def test_precision_and_recall() -> None:
    true = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [100.0], [101.0], [102.0], [103.0]])
    drawn = torch.tensor([[0.1], [1.1], [2.1], [3.1], [50.0]])
    found = precision_recall(true, drawn)
    assert found.precision == 4 / 5  # 50 is near nothing true
    # the radii of what was drawn: 3.0, 2.0, 2.0, 3.0 and, of 50, 48.9, which reaches 1.1 but neither 100 nor more
    assert found.recall == 5 / 9


def test_too_few() -> None:
    with pytest.raises(RequestError, match="has 1 pictures; at least 2"):
        fid(torch.zeros(1, 4), torch.zeros(5, 4))
    with pytest.raises(RequestError, match="has 3 pictures; at least 4"):
        precision_recall(torch.zeros(5, 4), torch.zeros(3, 4))
