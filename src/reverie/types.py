"""The few types that every floor speaks of. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """What a network is conditioned on.

    Attributes:
        context: `(B, L, D)`, the encoded prompt.
    """

    context: Tensor


Denoise: TypeAlias = Callable[["Tensor", float], "Tensor"]
"""`(x, sigma) -> x0`: the waist of the design. `x (B, C, h, w)` in units of sigma, `sigma` one number."""

Predict: TypeAlias = Callable[["Tensor", float, Cond], "Tensor"]
"""`(x, sigma, condition) -> x0`: one condition, before guidance."""

Noise: TypeAlias = Callable[[], "Tensor"]
"""The next standard normal sample, shaped like `x`."""
