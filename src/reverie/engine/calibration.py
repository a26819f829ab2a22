"""How long each way to compute a layer takes on this processor: measured when a shape is first met, and remembered.

One JSON file in the user's cache, by processor, torch, threads, and the shapes. Which way is the fastest differs from
processor to processor by factors, so that no table that comes with the program could say it.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from reverie.engine.remembered import Remembered
from reverie.places import user_cache

ENOUGH = 0.1  # seconds that the calls of one way are timed for
LEAST, MOST = 2, 9  # calls of a way that is among the fastest
FAR, CLOSE = 1.5, 1.15  # times the fastest: slower ways are not called again, after the first call, after later ones
GAIN = 0.95  # of the usual way's time: less is noise


@dataclass(frozen=True)
class Cost:
    """What a way takes.

    Attributes:
        call: seconds of each call.
        once: seconds until the weight is ready for it.
    """

    call: float
    once: float = 0.0

    def of(self, calls: int) -> float:
        """Seconds of so many calls."""
        return self.once + calls * self.call


@dataclass(frozen=True)
class Trial:
    """A way that can be timed.

    Attributes:
        run: one call with a ready weight.
        prepare: gives that weight.
    """

    run: Callable[[Any], object]
    prepare: Callable[[], object]


class Calibration:
    """Costs by the names of layers and shapes.

    Args:
        memory: where they are kept.
        machine: processor, versions, threads: what they hold for.
    """

    def __init__(self, memory: Remembered, machine: str) -> None:
        self._memory, self._machine = memory, machine

    @classmethod
    def of_environment(cls, machine: str) -> "Calibration":
        """In `reverie/speed.json` of the user's cache."""
        return cls(Remembered(user_cache() / "reverie" / "speed.json"), machine)

    def known(self, shape: str) -> dict[str, Cost]:
        """What was measured, by this process or an earlier one; empty where nothing was."""
        text = self._memory.get(f"{self._machine}, {shape}")
        with suppress(ValueError, TypeError, AttributeError):
            return {name: Cost(float(call), float(once)) for name, (call, once) in json.loads(text or "{}").items()}
        return {}

    def measured(self, shape: str, trials: Mapping[str, Trial]) -> dict[str, Cost]:
        """What is known of a shape; else it is measured now, and noted."""
        found = self.known(shape)
        if not trials.keys() <= found.keys():
            found = timed(trials)
            note = {name: [cost.call, cost.once] for name, cost in found.items()}
            self._memory.note(f"{self._machine}, {shape}", json.dumps(note))
        return found


def fastest(costs: Mapping[str, Cost], usual: str, calls: int) -> str:
    """The way that takes the least time for so many calls; the usual one unless another gains clearly."""
    best = min(costs, key=lambda name: costs[name].of(calls))
    return best if costs[best].of(calls) < GAIN * costs[usual].of(calls) else usual


@torch.no_grad()
def timed(trials: Mapping[str, Trial]) -> dict[str, Cost]:
    """Times in turn, so that other work on the machine falls on all alike; the least of each counts.

    Ways that are clearly slower drop out, and the last one that is left needs no more calls.
    """
    weights, once = {}, {}
    for name, trial in trials.items():
        start = time.perf_counter()
        weights[name] = trial.prepare()
        once[name] = time.perf_counter() - start
    least = {name: _seconds(trial, weights[name]) for name, trial in trials.items()}  # warms up, too
    calls, near = 1, _near(least, FAR)
    while len(near) > 1 and calls < min(max(ENOUGH / max(min(least.values()), 1e-6), LEAST), MOST):
        for name in near:
            least[name] = min(least[name], _seconds(trials[name], weights[name]))
        calls, near = calls + 1, _near({name: least[name] for name in near}, CLOSE)
    return {name: Cost(least[name], once[name]) for name in trials}


def _near(least: Mapping[str, float], times: float) -> list[str]:
    """Ways that take at most so many times what the fastest takes."""
    return [name for name, seconds in least.items() if seconds <= times * min(least.values())]


def _seconds(trial: Trial, weight: object) -> float:
    start = time.perf_counter()
    trial.run(weight)
    return time.perf_counter() - start
