"""Seconds from work: a rate that is measured, and what earlier pictures took."""

import time
from pathlib import Path

import pytest
import torch

from reverie.engine.budget import Plan
from reverie.engine.forecast import KINDS
from reverie.engine.measures import Measures
from reverie.engine.rates import UNKNOWN, Experience, Foretold, Seconds, bare_seconds, probe, settled
from reverie.engine.remembered import Remembered
from reverie.engine.usage import Usage, Used, resident

PLAN = Plan((), Measures(), 100, 50, "unet", 0, 1, None, None, "cpu", "sd1")


@pytest.fixture
def experience(tmp_path: Path) -> Experience:
    return Experience(Remembered(tmp_path / "forecasts.json"))


def test_every_kind_of_work_is_probed() -> None:
    rates = probe(torch.device("cpu"), torch.float32)
    assert set(rates) == set(KINDS)
    assert all(rate > 1e8 for rate in rates.values())  # 0.1 GFLOP/s: less is no computer of this century


def test_work_over_rate() -> None:
    assert bare_seconds({"convolution": 30.0, "linear": 8.0}, {"convolution": 10.0, "linear": 4.0}) == 5.0


def test_without_experience_it_is_a_range(experience: Experience) -> None:
    assert experience.expected("a", 2.0) == Seconds(2.0 * UNKNOWN[0], 2.0 * UNKNOWN[1], None)


def test_experience_corrects_by_the_median(experience: Experience, tmp_path: Path) -> None:
    for took in (3.0, 30.0, 4.0):
        experience.learn("a", 2.0, took)
    again = Experience(Remembered(tmp_path / "forecasts.json"))  # another process
    assert again.expected("a", 10.0) == Seconds(15.0, 150.0, 20.0)
    assert again.expected("b", 1.0).likely is None


def test_the_oldest_is_forgotten(experience: Experience) -> None:
    experience.learn("a", 1.0, 100.0)
    for _ in range(9):
        experience.learn("a", 1.0, 2.0)
    assert experience.expected("a", 1.0) == Seconds(2.0, 2.0, 2.0)


@pytest.mark.parametrize("text", ["", "no", "{}", '["x"]', "[1, null]"])
def test_a_broken_memory_is_an_empty_one(tmp_path: Path, text: str) -> None:
    memory = Remembered(tmp_path / "forecasts.json")
    memory.note("a", text)
    assert Experience(memory).expected("a", 1.0).likely is None


def test_plan_and_use_are_told_and_learnt(experience: Experience) -> None:
    foretold = Foretold(PLAN, {}, 2.0, Seconds(2.0, 8.0), "a")
    assert settled(foretold, Used(5.0, 110, 45), experience) == {
        "planned": {"own": 100, "mapped": 50, "seconds": {"low": 2.0, "high": 8.0, "likely": None}},
        "used": {"own": 110, "mapped": 45, "seconds": 5.0},
    }
    assert experience.expected("a", 2.0).likely == 5.0


@pytest.mark.skipif(resident() is None, reason="the system does not say what a process has in memory")
def test_use_is_what_was_there_at_most() -> None:
    """32 MiB that come and go, 20 ms each; pages are the system's unit, and what is looked at is looked at in steps."""
    with Usage(torch.device("cpu")) as usage:
        for _ in range(2):
            there = torch.ones(2**23)
            time.sleep(0.02)
            del there
    assert usage.used.own is not None
    assert 31 * 2**20 <= usage.used.own <= 48 * 2**20
    assert usage.used.seconds >= 0.04
