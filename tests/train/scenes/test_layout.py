"""Where things stand: inside, apart, and as the relation says."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie.train.scenes import layout
from reverie.train.scenes.compose import PAIRED
from reverie.train.scenes.scene import Place, Relation, Size


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def apart(first: Place, second: Place) -> bool:
    reach = (first.side + second.side) / 2
    return max(abs(first.x - second.x), abs(first.y - second.y)) >= reach - 1e-9


def inside(place: Place) -> bool:
    half = place.side / 2
    return all(c - half >= -1e-9 and c + half <= 1 + 1e-9 for c in (place.x, place.y))


seeds = st.integers(0, 2**32)
scatters = st.sampled_from([0, 0.15, 1])


@given(seeds, st.sampled_from([None, "small", "large"]), scatters)
def test_single(seed: int, size: Size | None, scatter: float) -> None:
    (place,) = layout.single(generator(seed), size, scatter)
    assert inside(place)
    assert {None: 0.5 < place.side < 0.9, "small": place.side < 0.45, "large": place.side > 0.9}[size]


@given(seeds, st.integers(2, 4), scatters)
def test_several(seed: int, count: int, scatter: float) -> None:
    places = layout.several(generator(seed), count, scatter)
    assert len(places) == count and all(map(inside, places))
    assert all(apart(*pair) for pair in combinations(places, 2))
    assert len({place.side for place in places}) == 1


@given(seeds, st.sampled_from(PAIRED), scatters)
def test_pair(seed: int, relation: Relation, scatter: float) -> None:
    first, second = layout.pair(generator(seed), relation, scatter)
    assert inside(first) and inside(second) and apart(first, second)
    assert (first.thing, second.thing) == (0, 1)
    reach = (first.side + second.side) / 2 - 1e-9
    gap = {
        "and": second.x - first.x,
        "left of": second.x - first.x,
        "right of": first.x - second.x,
        "above": second.y - first.y,
        "below": first.y - second.y,
    }[relation]
    assert gap >= reach


@given(seeds, scatters)
def test_ring(seed: int, scatter: float) -> None:
    middle, *around = layout.ring(generator(seed), scatter)
    assert 6 <= len(around) <= 8 and inside(middle) and all(map(inside, around))
    # Squares of neighbours on a ring may touch at corners; discs of that diameter never do.
    for first, second in combinations([middle, *around], 2):
        assert np.hypot(first.x - second.x, first.y - second.y) >= (first.side + second.side) / 2
    angles = sorted(np.arctan2(place.y - 0.5, place.x - 0.5) for place in around)
    gaps = np.diff([*angles, angles[0] + 2 * np.pi])
    assert gaps == pytest.approx([2 * np.pi / len(around)] * len(around))


@given(seeds, seeds)
def test_without_scatter_nothing_is_left_to_chance(seed: int, other: int) -> None:
    def places(g: np.random.Generator) -> list[tuple[Place, ...]]:
        return [
            *(layout.single(g, size, 0) for size in (None, "small", "large")),
            *(layout.several(g, count, 0) for count in (2, 3, 4)),
            *(layout.pair(g, relation, 0) for relation in PAIRED),
            layout.ring(g, 0),
        ]

    assert places(generator(seed)) == places(generator(other))
