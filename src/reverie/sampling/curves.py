"""How a scale changes over the steps of a run."""

import math
from collections.abc import Callable

import numpy as np

from reverie.errors import RequestError
from reverie.registry import Registry

CURVES = Registry[Callable[[float, float], float]]("guidance curve")
"""Factors `(place, power)` of a scale; `place` runs from 0 at the first step to 1 at the last."""

# Wang et al. 2024, "Analysis of Classifier-Free Guidance Weight Schedulers": rising, with 1 as mean over the run.
CURVES.add("constant", lambda p, k: 1.0)
CURVES.add("linear", lambda p, k: 2 * p)
CURVES.add("cosine", lambda p, k: 1 - math.cos(math.pi * p))
# The modes of the sd-dynamic-thresholding extension; `power` is its "scheduler value".
CURVES.add("linear_up", lambda p, k: p)
CURVES.add("linear_down", lambda p, k: 1 - p)
CURVES.add("cosine_up", lambda p, k: 1 - math.cos(p * math.pi / 2))
CURVES.add("cosine_down", lambda p, k: math.cos(p * math.pi / 2))
CURVES.add("half_cosine_up", lambda p, k: 1 - math.cos(p))
CURVES.add("half_cosine_down", lambda p, k: math.cos(p))
CURVES.add("power_up", lambda p, k: p**k)
CURVES.add("power_down", lambda p, k: 1 - p**k)
CURVES.add("linear_repeating", lambda p, k: abs(1 - 2 * (p * k % 1)))
CURVES.add("cosine_repeating", lambda p, k: math.cos(2 * math.pi * p * k) / 2 + 0.5)
CURVES.add("sawtooth", lambda p, k: p * k % 1)


def numbers(curve: str) -> tuple[float, ...] | None:
    """The scales of a curve that is written out, such as `1,7,3`; None where it is a name.

    Raises:
        RequestError: neither numbers nor the name of a curve.
    """
    if curve in CURVES:
        return None
    try:
        values = tuple(float(part) for part in curve.split(","))
    except ValueError:
        known = ", ".join(CURVES)
        raise RequestError(f"guidance curve {curve!r} is neither a name ({known}) nor numbers such as 1,7,3") from None
    if not all(0 <= value < math.inf for value in values):
        raise RequestError(f"guidance curve {curve!r}: expected numbers from 0 up")
    return values


def scheduled(curve: str, scale: float, index: int, steps: int, *, floor: float = 0.0, power: float = 1.0) -> float:
    """The scale at one step: `floor + (scale - floor) * factor`; numbers are scales themselves, joined by lines.

    A run of one step takes the middle of the curve.

    Raises:
        RequestError: see `numbers`.
    """
    place = index / (steps - 1) if steps > 1 else 0.5
    values = numbers(curve)
    if values is None:
        return floor + (scale - floor) * CURVES[curve](place, power)
    return float(np.interp(place * (len(values) - 1), range(len(values)), values))
