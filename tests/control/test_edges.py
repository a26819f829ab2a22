"""Edges, lines and scribbles against OpenCV and against their formulas."""

import cv2
import numpy as np
import pytest

from reverie.control.edges import ridges, thickened
from reverie.control.pixels import Pixels
from reverie.control.registry import load_all
from tests.control.pictures import scene

TABLE = load_all()


@pytest.mark.parametrize(("low", "high"), [(100, 200), (20, 60), (1, 255)])
def test_canny_is_opencvs(low: int, high: int) -> None:
    expected = cv2.Canny(scene(), low, high)
    assert np.count_nonzero(expected) > 0
    assert np.array_equal(TABLE["canny"].run(scene(), {"low": low, "high": high}), np.dstack([expected] * 3))


def drawing() -> Pixels:
    """A black frame, two pixels wide, on white paper."""
    picture = np.full((64, 64, 3), 255, dtype=np.uint8)
    cv2.rectangle(picture, (16, 16), (48, 48), (0, 0, 0), 2)
    return picture


def test_line_art_of_a_drawing_is_its_lines() -> None:
    found = TABLE["lineart"].run(drawing())[:, :, 0]
    lines = drawing()[:, :, 0] == 0
    assert found[lines].min() > 100
    assert found[~cv2.dilate(lines.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)].max() == 0


def test_line_art_is_its_formula() -> None:
    picture = scene().astype(np.float32)
    darker = np.min(cv2.GaussianBlur(picture, (0, 0), 4.0) - picture, axis=2).clip(0, 255)
    expected = (darker / max(16.0, np.median(darker[darker > 5])) * 127).clip(0, 255).astype(np.uint8)
    assert np.array_equal(TABLE["lineart"].run(scene(), {"sigma": 4, "floor": 5})[:, :, 0], expected)


@pytest.mark.parametrize("name", ["canny", "lineart", "scribble", "scribble_xdog"])
def test_a_blank_page_has_no_lines(name: str) -> None:
    assert not TABLE[name].run(np.full((40, 40, 3), 200, dtype=np.uint8)).any()


def test_xdog_is_its_formula() -> None:
    picture = scene().astype(np.float32)
    fine, coarse = (cv2.GaussianBlur(picture, (0, 0), s) for s in (0.5, 5.0))
    dog = (255 - np.min(coarse - fine, axis=2)).clip(0, 255).astype(np.uint8)
    expected = np.where(2 * (255 - dog.astype(np.float32)) > 32, 255, 0)
    assert 0 < np.count_nonzero(expected) < expected.size
    assert np.array_equal(TABLE["scribble_xdog"].run(scene())[:, :, 0], expected)


def test_scribbles_are_thicker_than_the_edges_they_follow() -> None:
    scribble, edges = TABLE["scribble"].run(drawing()), TABLE["canny"].run(drawing())
    assert set(np.unique(scribble)) == {0, 255}
    assert np.count_nonzero(scribble) > 3 * np.count_nonzero(edges)
    assert not scribble[30:34, 30:34].any()


def test_ridges_are_where_one_of_four_directions_has_its_maximum() -> None:
    soft = np.random.default_rng(1).random((12, 15)).astype(np.float32) * 255
    smooth = np.pad(cv2.GaussianBlur(soft, (0, 0), 1.0), 1, constant_values=-1)
    kept = np.zeros_like(soft)
    for y in range(12):
        for x in range(15):
            here = smooth[y + 1, x + 1]
            for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
                if here >= max(smooth[y + 1 + dy, x + 1 + dx], smooth[y + 1 - dy, x + 1 - dx]):
                    kept[y, x] = here
    assert np.array_equal(ridges(soft, 1.0), kept)


def test_a_line_is_thickened_by_about_its_blurs_width() -> None:
    lines = np.zeros((41, 41), dtype=np.float32)
    lines[20] = 255
    rows = np.flatnonzero(thickened(lines, 3.0)[:, 20])
    # 255 / (3 sqrt(2 pi)) exp(-d² / 18) > 4 for d < 6.2
    assert rows.tolist() == list(range(14, 27))


def test_thresholds() -> None:
    picture = np.zeros((4, 4, 3), dtype=np.uint8)
    picture[:2] = 200
    white = np.repeat(np.repeat([[255], [255], [0], [0]], 4, axis=1)[:, :, None], 3, axis=2)
    assert np.array_equal(TABLE["threshold"].run(picture), white)
    assert np.array_equal(TABLE["threshold"].run(picture, {"invert": True}), 255 - white)
    assert not TABLE["threshold"].run(picture, {"threshold": 210}).any()
    assert np.array_equal(TABLE["invert"].run(picture), 255 - picture)
