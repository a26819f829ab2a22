"""Sizes that the network sees, and normals of known surfaces."""

import numpy as np
import pytest

from reverie.control.depth import normals, seen_size
from reverie.control.registry import load_all

TABLE = load_all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((518, 518), (518, 518)),
        ((480, 640), (518, 686)),  # the published processor's answer for 640 x 480 (DPT: 518, multiples of 14)
        ((1, 1), (518, 518)),
        ((1, 100_000), (14, 518)),
        ((518, 5180), (210, 2072)),
        ((1080, 1920), (518, 924)),
    ],
)
def test_seen_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert seen_size(*size) == expected


def test_normals_of_slopes() -> None:
    """A Sobel filter sums to 8 times the slope; the view direction weighs 0.1."""
    slope = 0.0125 * np.arange(20, dtype=np.float32)
    right = normals(np.tile(slope, (20, 1)), 0.1, 0.0)[10, 10]
    down = normals(np.tile(slope[:, None], (1, 20)), 0.1, 0.0)[10, 10]
    half = np.sqrt(0.5)
    assert right.tolist() == [int(127.5 + half * 127.5), 127, int(127.5 + half * 127.5)]
    assert down.tolist() == [127, int(127.5 + half * 127.5), int(127.5 + half * 127.5)]


def test_the_background_is_flat() -> None:
    values = np.random.default_rng(0).random((10, 10)).astype(np.float32)
    found = normals(values, 0.1, 0.5)
    assert (found[values < 0.5] == (127, 127, 255)).all()
    assert not (found[values >= 0.5] == (127, 127, 255)).all()


def test_a_flat_depth_map_faces_us() -> None:
    assert (TABLE["normal_from_depth"].run(np.full((9, 9, 3), 70, dtype=np.uint8)) == (127, 127, 255)).all()


@pytest.mark.usefixtures("weights")
def test_depth_spans_black_to_white_and_inverts() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    near, far = (TABLE["depth"].run(picture, {"invert": invert}) for invert in (False, True))
    assert (near.min(), near.max()) == (0, 255)
    assert np.abs(255 - near.astype(int) - far).max() <= 1  # both are cut to whole numbers
