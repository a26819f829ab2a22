"""Batches that are prepared ahead: by whom they are computed changes nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from reverie.train.ahead import AHEAD, Ahead, prepared
from reverie.train.data import ComposedPictures
from reverie.train.scenes import ScenesConfig
from tests.train.scenes.world import write_world

NUMBERS = [0, 1, 2, 7, 8, 3]  # in order, a jump ahead, and back


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposedPictures]:
    folder = tmp_path_factory.mktemp("sprites")
    write_world(folder)
    yield ComposedPictures(ScenesConfig(path=folder, size=32), seed=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_data(data: ComposedPictures, workers: int) -> None:
    batch = prepared(data, 5, 1, workers)
    for number in NUMBERS:
        pixels, captions = batch(number)
        wanted, said = data.batch(number, 5)
        assert torch.equal(pixels, wanted) and captions == said


def test_so_many_are_computed_ahead_and_none_twice() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return -number

    ahead = Ahead(make, 3)
    assert [ahead(number) for number in (0, 3, 6)] == [0, -3, -6]
    assert sorted(made) == sorted(set(made)) and set(made) <= {3 * n for n in range(AHEAD + 3)}


def test_what_goes_wrong_ahead_is_said_when_it_is_asked_for(tmp_path: Path) -> None:
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("the second")
        return number

    ahead = Ahead(make, 1)
    assert [ahead(0), ahead(1)] == [0, 1]
    with pytest.raises(ValueError, match="the second"):
        ahead(2)
