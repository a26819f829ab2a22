"""The table of named things: forgiving to look up, strict to fill, helpful to refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie.errors import RequestError
from reverie.registry import Registry, normalise


def table() -> Registry[int]:
    registry = Registry[int]("sampler")
    registry.add("dpmpp_2m", 1, ("DPM++ 2M", "DPMSolverMultistepScheduler"))
    registry.add("euler_a", 2, ("Euler a", "euler_ancestral"))
    registry.add("heun", 3)
    return registry


@pytest.mark.parametrize("name", ["dpmpp_2m", "DPM++ 2M", "dpm++_2m", " dpm++  2m ", "DPMPP-2M"])
def test_spelling_is_forgiven(name: str) -> None:
    assert table()[name] == 1
    assert table().name(name) == "dpmpp_2m"
    assert name in table()


@given(st.text())
def test_normalising_twice_changes_nothing(name: str) -> None:
    assert normalise(normalise(name)) == normalise(name)


@given(st.lists(st.sampled_from(["a", "B", "2m"]), min_size=1), st.sampled_from(["-", "_", " ", " - ", "__"]))
def test_separators_are_one(words: list[str], separator: str) -> None:
    assert normalise(separator.join(words)) == "_".join(words).lower()


@pytest.mark.parametrize(("typed", "meant"), [("eular a", "euler_a"), ("Huen", "heun"), ("dpm++ 2n", "dpmpp_2m")])
def test_the_nearest_name_is_suggested(typed: str, meant: str) -> None:
    with pytest.raises(RequestError) as caught:
        table()[typed]
    assert str(caught.value) == f"unknown sampler {typed!r}; did you mean {meant!r}? Known: dpmpp_2m, euler_a, heun"


@pytest.mark.parametrize("typed", ["", "zzzzzzzz", "\n", "🐢"])
def test_a_name_near_to_nothing_gets_the_list(typed: str) -> None:
    with pytest.raises(RequestError, match="; known: dpmpp_2m, euler_a, heun") as caught:
        table().name(typed)
    assert "\n" not in str(caught.value)
    assert typed not in table()


def test_a_name_taken_by_another_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="'euler ancestral' is taken by 'euler_a'"):
        table().add("euler_two", 4, ("euler ancestral",))


def test_adding_again_under_the_same_name_replaces() -> None:
    registry = table()
    registry.add("heun", 30)
    assert registry["heun"] == 30
    assert len(registry) == 3


def test_it_iterates_in_order_and_lists_aliases() -> None:
    assert list(table()) == ["dpmpp_2m", "euler_a", "heun"]
    assert table().aliases("dpmpp_2m") == ["DPM++ 2M", "DPMSolverMultistepScheduler"]
    assert table().aliases("heun") == []
    assert 3 not in table()
