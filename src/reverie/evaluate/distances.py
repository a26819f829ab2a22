"""Distances between two sets of pictures, from their features `(N, D)`; all in float64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reverie.errors import RequestError

SUBSET = 1000  # pictures a subset of KID, as torch-fidelity takes them
SUBSETS = 100
NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019, section 3)


def fid(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians with the sets' means and covariances (Heusel et al. 2017, equation 6).

    Raises:
        RequestError: fewer than two pictures in a set.
    """
    a, b = _checked(a, 2), _checked(b, 2)
    x, y = (f - f.mean(0) for f in (a, b))
    spread = x.square().sum() / (len(a) - 1) + y.square().sum() / (len(b) - 1)
    means = (a.mean(0) - b.mean(0)).square().sum()
    return max(float(means + spread - 2 * _root_trace(x, y)), 0.0)


def _root_trace(x: Tensor, y: Tensor) -> Tensor:
    """The trace of the root of `C_x C_y`, of centred features: the roots of its eigenvalues, summed.

    They are the singular values of `x yᵀ`, but for the counts, and the roots of the eigenvalues of `R C_y R`, with
    `R² = C_x`. The first is exact where covariances are singular, the second cheaper where there are many pictures.
    """
    if len(x) * len(y) <= x.shape[1] ** 2:
        exact: Tensor = torch.linalg.svdvals(x @ y.T).sum() / math.sqrt((len(x) - 1) * (len(y) - 1))
        return exact
    values, vectors = torch.linalg.eigh(torch.cov(x.T).reshape(x.shape[1], -1))
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    inner = root @ torch.cov(y.T).reshape(root.shape) @ root
    roots: Tensor = torch.linalg.eigvalsh(inner).clamp(min=0).sqrt()
    return roots.sum()


@dataclass(frozen=True)
class Kid:
    """Kernel inception distance: its mean over subsets, and their standard deviation."""

    mean: float
    deviation: float


def kid(a: Tensor, b: Tensor, *, seed: int = 0) -> Kid:
    """Squared maximum mean discrepancy with the kernel `(x·y / D + 1)³`, unbiased (Bińkowski et al. 2018, section 4).

    Raises:
        RequestError: fewer than two pictures in a set.
    """
    a, b = _checked(a, 2), _checked(b, 2)
    size, g = min(SUBSET, len(a), len(b)), torch.Generator().manual_seed(seed)
    found = torch.stack([
        _discrepancy(a[torch.randperm(len(a), generator=g)[:size]], b[torch.randperm(len(b), generator=g)[:size]])
        for _ in range(SUBSETS)
    ])  # fmt: skip
    return Kid(float(found.mean()), float(found.std()))


def _discrepancy(a: Tensor, b: Tensor) -> Tensor:
    n, width = len(a), a.shape[1]
    aa, bb, ab = ((x @ y.T / width + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    return (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (n * (n - 1)) - 2 * ab.mean()


@dataclass(frozen=True)
class PrecisionRecall:
    """How many of the drawn pictures lie among the true ones, and how many of the true ones among the drawn."""

    precision: float
    recall: float


def precision_recall(true: Tensor, drawn: Tensor, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Whether a picture is within the k-th neighbour's distance of any of the others (Kynkäänniemi et al. 2019).

    Raises:
        RequestError: not more than k pictures in a set.
    """
    true, drawn = _checked(true, k + 1), _checked(drawn, k + 1)
    between = torch.cdist(true, drawn)
    near = [torch.cdist(x, x).kthvalue(k + 1, dim=1).values for x in (true, drawn)]  # the first is the picture itself
    precision = (between <= near[0][:, None]).any(0).double().mean()
    recall = (between <= near[1][None]).any(1).double().mean()
    return PrecisionRecall(float(precision), float(recall))


def _checked(features: Tensor, least: int) -> Tensor:
    if len(features) < least:
        raise RequestError(f"a set has {len(features)} pictures; at least {least} are needed")
    return features.double()
