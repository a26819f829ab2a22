"""Whether what was drawn is a copy of what was learned from: the distance to the nearest training picture."""

from dataclasses import dataclass

import torch
from torch import Tensor

from reverie.evaluate.scores import Share

SUSPICIOUS = 0.01  # quantile of the true pictures' distances below which a drawn picture is suspiciously near


@dataclass(frozen=True)
class Nearness:
    """Distances to the nearest of a pool of training pictures.

    Attributes:
        drawn, true: medians, of what was drawn and of the true pictures of the same scenes, which nobody can have
            copied.
        near: drawn pictures that are nearer than all but one in a hundred of the true ones.
    """

    drawn: float
    true: float
    near: Share

    def json(self) -> dict[str, float]:
        """Numbers alone."""
        return {"drawn": self.drawn, "true": self.true} | {f"near_{k}": v for k, v in self.near.json().items()}


def nearest(of: Tensor, pool: Tensor) -> Tensor:
    """The distance of each row of `of (N, D)` to the nearest of `pool (M, D)`, per root of D: `(N,)`."""
    distances: Tensor = torch.cdist(of, pool).amin(dim=1) / of.shape[1] ** 0.5
    return distances


def nearness(drawn: Tensor, true: Tensor, pool: Tensor) -> Nearness:
    """Compare drawn with true pictures, by features or pixels `(N, D)`; scenes are the same, row by row."""
    a, b = nearest(drawn, pool), nearest(true, pool)
    near = int((a < b.quantile(SUSPICIOUS, interpolation="lower")).sum())
    return Nearness(float(a.median()), float(b.median()), Share(near, len(a)))
