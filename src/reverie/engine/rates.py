"""From work to seconds: what this machine computes a second, and what earlier pictures on it took.

A short probe says how fast convolutions, matrix products and attention of middle size are now. A picture takes longer
than that: norms, small layers, the sampler. How much longer is remembered for every family of models and precision.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.engine.budget import Plan
from reverie.engine.remembered import Remembered
from reverie.engine.tuning import machine
from reverie.engine.usage import Used
from reverie.places import user_cache

if TYPE_CHECKING:
    from reverie.engine.bundle import Model

ENOUGH = 0.08  # seconds that one kind of work is probed
KEPT = 9  # pictures that are remembered
UNKNOWN = (1.0, 4.0)  # times the work over the rate, where no picture was drawn: from nothing else to small networks


@dataclass(frozen=True)
class Seconds:
    """How long a picture takes.

    Attributes:
        low, high: a range; of what earlier pictures took where there are some.
        likely: the median of those; None where there are none.
    """

    low: float
    high: float
    likely: float | None = None


def probe(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Floating point operations a second, by kind of work, for tensors of the size that a U-Net has in its middle."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    picture, kernel = noise(2, 320, 32, 32), noise(320, 320, 3, 3)
    tokens, weight, heads = noise(1024, 640), noise(2560, 640), noise(2, 8, 1024, 80)
    subjects: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "convolution": (2 * 2 * 32 * 32 * 320 * 320 * 9, lambda: F.conv2d(picture, kernel, padding=1)),
        "linear": (2 * 1024 * 640 * 2560, lambda: F.linear(tokens, weight)),
        "attention": (4 * 2 * 8 * 1024 * 1024 * 80, lambda: F.scaled_dot_product_attention(heads, heads, heads)),
    }
    with torch.no_grad():
        return {kind: flops / _quickest(run, device) for kind, (flops, run) in subjects.items()}


def _quickest(run: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of the quickest of some calls."""
    started, found = time.perf_counter(), float("inf")
    while time.perf_counter() - started < ENOUGH or found == float("inf"):
        before = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found = min(found, time.perf_counter() - before)
    return found


def bare_seconds(flops: Mapping[str, float], rates: Mapping[str, float]) -> float:
    """Work over rate: what nothing else would have to be added to."""
    return sum(count / rates[kind] for kind, count in flops.items())


class Experience:
    """What pictures took in units of their work over the rate of the machine.

    Args:
        memory: where it is kept; the user's cache if None.
    """

    def __init__(self, memory: Remembered | None = None) -> None:
        self._memory = memory or Remembered(user_cache() / "reverie" / "forecasts.json")

    def expected(self, key: str, bare: float) -> Seconds:
        """How long a picture takes.

        Args:
            key: see `key_for`.
            bare: see `bare_seconds`.
        """
        ratios = self._ratios(key)
        if not ratios:
            return Seconds(UNKNOWN[0] * bare, UNKNOWN[1] * bare)
        return Seconds(min(ratios) * bare, max(ratios) * bare, median(ratios) * bare)

    def learn(self, key: str, bare: float, took: float) -> None:
        """Remember a picture; the oldest is forgotten."""
        if bare > 0 and took > 0:
            self._memory.note(key, json.dumps([*self._ratios(key), took / bare][-KEPT:]))

    def _ratios(self, key: str) -> list[float]:
        try:
            found = json.loads(self._memory.get(key) or "[]")
            return [float(ratio) for ratio in found if float(ratio) > 0]
        except (ValueError, TypeError):
            return []


def key_for(model: "Model", plan: Plan) -> str:
    """Pictures with the same key take alike: machine, family, precision, and measures that cost time."""
    how = "by blocks" if plan.measures.blocks else model.speed.mode
    return f"{machine(model.device)}: {plan.family} {str(model.dtype).removeprefix('torch.')} {how}"


@dataclass(frozen=True)
class Foretold:
    """A plan with its seconds.

    Attributes:
        rates: floating point operations a second, as they were probed.
        bare: seconds of the work alone.
        expected: seconds of the pictures.
        key: of what is learnt from them.
    """

    plan: Plan
    rates: dict[str, float]
    bare: float
    expected: Seconds
    key: str

    def figures(self) -> dict[str, Any]:
        """Memory in bytes and seconds, as they are told to programs."""
        seconds = {"low": self.expected.low, "high": self.expected.high, "likely": self.expected.likely}
        rounded = {name: None if value is None else round(value, 3) for name, value in seconds.items()}
        return {"own": self.plan.own, "mapped": self.plan.mapped, "seconds": rounded}


def foretell(model: "Model", plan: Plan, experience: Experience | None = None) -> Foretold:
    """How long what is planned takes: the machine is probed, and earlier pictures are remembered."""
    rates, key = probe(model.device, model.dtype), key_for(model, plan)
    bare = bare_seconds(plan.flops, rates)
    return Foretold(plan, rates, bare, (experience or Experience()).expected(key, bare), key)


def settled(foretold: Foretold, used: Used, experience: Experience | None = None) -> dict[str, Any]:
    """What was planned and what was used, as they are told to programs; the next pictures are planned with it."""
    (experience or Experience()).learn(foretold.key, foretold.bare, used.seconds)
    took = {"own": used.own, "mapped": used.mapped, "seconds": round(used.seconds, 3)}
    return {"planned": foretold.figures(), "used": took}
