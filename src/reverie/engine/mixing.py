"""Arithmetic of merges: one tensor of several models becomes one tensor. All in float32."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from reverie.registry import Registry

PARALLEL = 1 - 1e-6  # cosine beyond which an arc is a line


@dataclass(frozen=True)
class Options:
    """Settings of a merge.

    Attributes:
        density: the share of a difference's numbers that `ties` and `dare` keep.
        seed: of what `dare` drops.
    """

    density: float = 0.2
    seed: int = 0


Mix: TypeAlias = Callable[[Tensor, Sequence[Tensor], Sequence[float], Tensor, Options], Tensor]
"""`(first, others, their weights, base, options) -> merged`; all tensors float32 of one shape."""


@dataclass(frozen=True)
class Method:
    """A way to merge.

    Attributes:
        needs_base: whether differences are taken from a third model, which must be given.
        pairs: whether it merges exactly two models.
        source: the paper, or the program that people know it from.
    """

    mix: Mix
    description: str
    source: str
    needs_base: bool = False
    pairs: bool = False


METHODS: Registry[Method] = Registry("way to merge")


def weighted_sum(first: Tensor, others: Sequence[Tensor], weights: Sequence[float], _: Tensor, __: Options) -> Tensor:
    """`A + sum of w_i (B_i - A)`."""
    return first + sum((w * (other - first) for w, other in zip(weights, others, strict=True)), torch.zeros(()))


def add_difference(
    first: Tensor, others: Sequence[Tensor], weights: Sequence[float], base: Tensor, _: Options
) -> Tensor:
    """`A + sum of w_i (B_i - base)`."""
    return first + sum((w * (other - base) for w, other in zip(weights, others, strict=True)), torch.zeros(()))


def slerp(first: Tensor, others: Sequence[Tensor], weights: Sequence[float], _: Tensor, __: Options) -> Tensor:
    """Along the arc from A to B (Shoemake 1985), whose lengths are mixed linearly; along the line where they align."""
    (other,), (weight,) = others, weights
    lengths = first.norm(), other.norm()
    if not lengths[0] or not lengths[1]:
        return torch.lerp(first, other, weight)
    cosine = float(((first / lengths[0]) * (other / lengths[1])).sum().clamp(-1, 1))
    if abs(cosine) > PARALLEL:
        return torch.lerp(first, other, weight)
    angle = torch.tensor(cosine).acos()
    a, b = ((1 - weight) * angle).sin() / angle.sin(), (weight * angle).sin() / angle.sin()
    arc: Tensor = (a * first / lengths[0] + b * other / lengths[1]) * torch.lerp(*lengths, weight)
    return arc


def ties(first: Tensor, others: Sequence[Tensor], weights: Sequence[float], base: Tensor, options: Options) -> Tensor:
    """Trim, elect sign, merge (Yadav et al. 2023): the largest numbers of each difference, where most weight agrees."""
    trimmed = [w * _largest(model - base, options.density) for model, w in _weighed(first, others, weights)]
    return base + _elected(trimmed, [w for _, w in _weighed(first, others, weights)])


def dare(first: Tensor, others: Sequence[Tensor], weights: Sequence[float], base: Tensor, options: Options) -> Tensor:
    """Drop and rescale (Yu et al. 2023): a random share of each difference's numbers, made larger, added up."""
    g = torch.Generator().manual_seed(options.seed)
    models = _weighed(first, others, weights)
    return base + sum((w * _dropped(model - base, options.density, g) for model, w in models), torch.zeros(()))


def dare_ties(
    first: Tensor, others: Sequence[Tensor], weights: Sequence[float], base: Tensor, options: Options
) -> Tensor:
    """As `dare`, but where most weight agrees on the sign."""
    g = torch.Generator().manual_seed(options.seed)
    models = _weighed(first, others, weights)
    return base + _elected([w * _dropped(model - base, options.density, g) for model, w in models],
                           [w for _, w in models])  # fmt: skip


def _weighed(first: Tensor, others: Sequence[Tensor], weights: Sequence[float]) -> list[tuple[Tensor, float]]:
    """Every model with its weight; the first has what the others leave of 1."""
    return [(first, 1 - sum(weights)), *zip(others, weights, strict=True)]


def _largest(difference: Tensor, density: float) -> Tensor:
    """The share `density` of its numbers that are largest, the rest zero."""
    kept = max(round(density * difference.numel()), 1)
    threshold = difference.abs().flatten().kthvalue(difference.numel() - kept + 1).values
    return torch.where(difference.abs() >= threshold, difference, 0.0)


def _dropped(difference: Tensor, density: float, g: torch.Generator) -> Tensor:
    kept = torch.rand(difference.shape, generator=g) < density
    return torch.where(kept, difference / density, 0.0)


def _elected(differences: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Where signs disagree the larger sum wins; the weighted mean of those that agree."""
    stacked = torch.stack(list(differences))
    agree = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    shares = torch.tensor(weights).view(-1, *(1,) * differences[0].ndim) * agree
    return torch.where(agree, stacked, 0.0).sum(0) / shares.sum(0).abs().clamp(min=1e-12)


METHODS.add("weighted_sum", Method(weighted_sum, "A + w (B - A)", "AUTOMATIC1111"), ("sum", "linear"))
METHODS.add(
    "add_difference", Method(add_difference, "A + w (B - base)", "AUTOMATIC1111; Ilharco et al. 2023", needs_base=True)
)
METHODS.add("slerp", Method(slerp, "along the arc from A to B", "Shoemake 1985", pairs=True))
METHODS.add("ties", Method(ties, "the largest differences that agree in sign", "Yadav et al. 2023", needs_base=True))
METHODS.add(
    "dare", Method(dare, "a random share of the differences, made larger", "Yu et al. 2023", needs_base=True),
    ("dare_linear",),
)  # fmt: skip
METHODS.add("dare_ties", Method(dare_ties, "dare, where signs agree", "Yu et al. 2023", needs_base=True))
