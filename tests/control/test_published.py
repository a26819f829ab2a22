"""The published weights, where they were fetched: `python recipes/control/fetch.py all`, then `pytest -m slow`."""

import numpy as np
import pytest

from reverie.control.pixels import Pixels, opencv
from reverie.control.registry import load_all
from reverie.control.weights import WEIGHTS
from reverie.errors import RequestError

TABLE = load_all()
pytestmark = pytest.mark.slow


def fetched(name: str) -> None:
    try:
        WEIGHTS[name].find()
    except RequestError as error:
        pytest.skip(str(error))


def house() -> Pixels:
    """A white house front with a door on a dark ground: straight lines, and nobody."""
    cv2 = opencv()
    picture = np.full((384, 512, 3), 50, dtype=np.uint8)
    cv2.rectangle(picture, (120, 80), (400, 320), (235, 230, 220), -1)
    cv2.rectangle(picture, (220, 200), (280, 320), (120, 60, 30), -1)
    cv2.rectangle(picture, (320, 130), (370, 190), (90, 140, 200), -1)
    return picture


def test_hed_finds_the_outline_and_not_the_wall() -> None:
    fetched("hed")
    edges = TABLE["softedge"].run(house())[:, :, 0]
    for row, column in ((200, 120), (200, 400), (80, 200), (260, 220)):
        assert edges[row - 3 : row + 4, column - 3 : column + 4].max() > 150
    assert edges[250:300, 320:380].max() < 40
    assert edges[20:50, 20:90].max() < 40


def test_mlsd_finds_the_walls_to_a_few_pixels() -> None:
    fetched("mlsd")
    lines = TABLE["mlsd"].run(house())[:, :, 0] > 0
    assert lines[100:300, 117:124].any(axis=1).mean() > 0.8
    assert lines[100:300, 397:404].any(axis=1).mean() > 0.8
    assert not lines[:60].any()


def test_a_house_has_no_skeleton_and_no_person() -> None:
    fetched("openpose_light")
    fetched("deeplab")
    assert not TABLE["openpose"].run(house()).any()
    person = np.array((150, 5, 61), dtype=np.uint8)
    assert not (TABLE["segmentation_voc"].run(house()) == person).all(axis=2).any()
