"""Costs of ways: measured once, remembered, weighed by how often a layer is asked."""

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reverie.engine.calibration import Calibration, Cost, Trial, fastest, timed
from reverie.engine.remembered import Remembered

WAIT = 0.01  # seconds, far above what a call itself takes


def trials(counts: dict[str, int]) -> dict[str, Trial]:
    """A slow way, and a fast one whose weight takes a while."""

    def way(name: str, call: float, once: float) -> Trial:
        def prepare() -> Tensor:
            time.sleep(once)
            return torch.zeros(1)

        def run(weight: Tensor) -> None:
            counts[name] = counts.get(name, 0) + 1
            time.sleep(call)

        return Trial(run, prepare)

    return {"slow": way("slow", 3 * WAIT, 0), "fast": way("fast", WAIT, 2 * WAIT)}


def test_times_of_ways() -> None:
    found = timed(trials({}))
    assert found["fast"].call < found["slow"].call and found["fast"].once > found["slow"].once
    assert found["slow"].call >= 3 * WAIT and found["fast"].call >= WAIT


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [
        ({"slow": [3.0], "fast": [1.0]}, {"slow": 1, "fast": 1}),  # hopeless at once, and nothing left to compare
        ({"a": [1.0], "b": [1.05], "far": [1.6]}, {"a": 2, "b": 2, "far": 1}),  # long calls: twice
        ({"a": [0.001], "b": [0.00105], "far": [0.0016]}, {"a": 9, "b": 9, "far": 1}),
        ({"a": [0.021], "b": [0.021]}, {"a": 5, "b": 5}),  # a tenth of a second in all
        ({"cold": [0.0014, 0.0011, 0.0009], "warm": [0.001]}, {"cold": 9, "warm": 9}),
        ({"late": [0.0014, 0.0012], "warm": [0.001]}, {"late": 2, "warm": 2}),  # too slow when warm, too
    ],
)
def test_only_the_fastest_are_timed_again(
    seconds: dict[str, list[float]], calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, counts = 0.0, dict.fromkeys(seconds, 0)
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def run(name: str) -> None:
        nonlocal now
        now += seconds[name][min(counts[name], len(seconds[name]) - 1)]
        counts[name] += 1

    found = timed({name: Trial(lambda _, name=name: run(name), lambda: None) for name in seconds})  # type: ignore[misc]
    assert counts == calls
    assert all(found[name].call == pytest.approx(min(own)) for name, own in seconds.items())


@pytest.mark.parametrize(
    ("costs", "calls", "way"),
    [
        ({"plain": Cost(1.0), "packed": Cost(0.5, 3.0)}, 1, "plain"),
        ({"plain": Cost(1.0), "packed": Cost(0.5, 3.0)}, 6, "plain"),  # as much time
        ({"plain": Cost(1.0), "packed": Cost(0.5, 3.0)}, 8, "packed"),
        ({"plain": Cost(1.0), "packed": Cost(0.97)}, 64, "plain"),  # too little to be more than noise
        ({"plain": Cost(1.0), "other": Cost(0.8), "packed": Cost(0.5, 3.0)}, 8, "other"),
        ({"plain": Cost(1.0)}, 64, "plain"),
    ],
)
def test_the_fastest_way_depends_on_how_often_it_is_gone(costs: dict[str, Cost], calls: int, way: str) -> None:
    assert fastest(costs, "plain", calls) == way


def test_costs_are_measured_once_for_every_process(tmp_path: Path) -> None:
    counts: dict[str, int] = {}
    found = Calibration(Remembered(tmp_path / "speed.json"), "here").measured("some layer", trials(counts))
    before = dict(counts)
    again = Calibration(Remembered(tmp_path / "speed.json"), "here")  # as another process
    assert again.measured("some layer", trials(counts)) == found and counts == before
    assert again.known("some layer") == found and again.known("another") == {}
    assert Calibration(Remembered(tmp_path / "speed.json"), "elsewhere").known("some layer") == {}


def test_a_new_way_is_measured(tmp_path: Path) -> None:
    ways, here = trials({}), Calibration(Remembered(tmp_path / "speed.json"), "here")
    here.measured("some layer", {"slow": ways["slow"]})
    assert here.measured("some layer", ways).keys() == {"slow", "fast"}


@pytest.mark.parametrize("text", ['"no table"', "[1]", '{"slow": 1}', '{"slow": ["a", "b"]}', "{"])
def test_what_cannot_be_read_is_measured_again(text: str, tmp_path: Path) -> None:
    memory = Remembered(tmp_path / "speed.json")
    memory.note("here, some layer", text)
    assert Calibration(memory, "here").known("some layer") == {}
    assert Calibration(memory, "here").measured("some layer", trials({})).keys() == {"slow", "fast"}


def test_it_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Calibration.of_environment("here").measured("some layer", trials({}))
    assert (tmp_path / "reverie" / "speed.json").exists()
