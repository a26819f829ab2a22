"""Guidance scales over the steps."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie.errors import RequestError
from reverie.sampling.curves import CURVES, numbers, scheduled


@pytest.mark.parametrize("curve", ["constant", "linear", "cosine"])
def test_the_published_curves_keep_the_mean(curve: str) -> None:
    """Wang et al. 2024 scale them so that the weight is spent once over the run."""
    steps = 101
    mean = sum(scheduled(curve, 7.0, i, steps, floor=1.0) for i in range(steps)) / steps
    assert mean == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("curve", "first", "middle", "last"),
    [
        ("constant", 8, 8, 8),
        ("linear", 0, 8, 16),
        ("cosine", 0, 8, 16),
        ("linear_up", 0, 4, 8),
        ("Linear Down", 8, 4, 0),
        ("cosine_up", 0, 8 * (1 - math.sqrt(0.5)), 8),
        ("cosine_down", 8, 8 * math.sqrt(0.5), 0),
        ("half_cosine_up", 0, 8 * (1 - math.cos(0.5)), 8 * (1 - math.cos(1))),
        ("half_cosine_down", 8, 8 * math.cos(0.5), 8 * math.cos(1)),
        ("linear_repeating", 8, 0, 8),
        ("cosine_repeating", 8, 0, 8),
        ("sawtooth", 0, 4, 0),
    ],
)
def test_values(curve: str, first: float, middle: float, last: float) -> None:
    got = [scheduled(curve, 8.0, i, 3) for i in range(3)]
    assert got == pytest.approx([first, middle, last], abs=1e-9)


def test_power_bends_the_power_curves() -> None:
    assert scheduled("power_up", 8.0, 1, 3, power=3) == pytest.approx(1.0)
    assert scheduled("power_down", 8.0, 1, 3, power=3) == pytest.approx(7.0)


@given(st.sampled_from(list(CURVES)), st.floats(0, 30), st.floats(0, 30), st.integers(1, 60), st.data())
def test_floor_and_scale_bound_a_curve(curve: str, scale: float, floor: float, steps: int, data: st.DataObject) -> None:
    """But for the two that rise to twice the scale, every curve stays between its floor and its scale."""
    index = data.draw(st.integers(0, steps - 1))
    value = scheduled(curve, scale, index, steps, floor=floor)
    most = floor + (scale - floor) * (2 if curve in {"linear", "cosine"} else 1)
    assert min(floor, most) - 1e-9 <= value <= max(floor, most) + 1e-9


def test_numbers_are_scales_joined_by_lines() -> None:
    assert [scheduled("1, 7,3", 99.0, i, 5) for i in range(5)] == pytest.approx([1, 4, 7, 5, 3])
    assert scheduled("2.5", 99.0, 3, 5) == 2.5


def test_a_run_of_one_step_takes_the_middle() -> None:
    assert scheduled("linear_up", 8.0, 0, 1) == 4
    assert scheduled("1,7,3", 99.0, 0, 1) == 7


@pytest.mark.parametrize("curve", ["lineer", "", "1,,2", "1,-2", "nan", "1,inf", "1;2"])
def test_what_is_no_curve_is_refused(curve: str) -> None:
    with pytest.raises(RequestError, match="guidance curve") as error:
        numbers(curve)
    assert "\n" not in str(error.value)
