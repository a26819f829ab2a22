"""Segments from M-LSD's maps, and their drawing."""

import numpy as np
import torch

from reverie.control.lines import MOST_SEGMENTS, drawn, segments


def maps() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((40, 50), -10.0), torch.zeros(4, 40, 50)


def test_a_segment_is_its_middle_and_both_ends() -> None:
    middles, ends = maps()
    middles[12, 30] = 3.0
    ends[:, 12, 30] = torch.tensor([-10.0, -4.0, 10.5, 4.25])
    np.testing.assert_allclose(segments(middles, ends, 0.1, 0.1), [[20, 8, 40.5, 16.25]])


def test_the_surest_of_neighbours_stays_and_comes_first() -> None:
    middles, ends = maps()
    ends[2] = 9.0
    for row, column, logit in ((5, 5, 1.0), (5, 6, 2.0), (20, 20, 4.0), (30, 30, -1.0)):
        middles[row, column] = logit
    found = segments(middles, ends, 0.5, 0.1)
    np.testing.assert_allclose(found[:, :2], [[20, 20], [6, 5]])


def test_short_ones_are_left_out() -> None:
    middles, ends = maps()
    middles[5, 5] = middles[20, 20] = 3.0
    ends[:2, 5, 5] = torch.tensor([3.0, 4.0])  # 5 pixels long
    ends[:2, 20, 20] = torch.tensor([6.0, 8.0])
    assert len(segments(middles, ends, 0.1, 4.9)) == 2
    assert len(segments(middles, ends, 0.1, 5.1)) == 1
    assert segments(middles, ends, 0.1, 10.1).shape == (0, 4)


def test_noise_is_bounded_and_small_maps_do() -> None:
    random = torch.Generator().manual_seed(0)
    ends = torch.randn(4, 100, 100, generator=random) * 20
    assert len(segments(torch.randn(100, 100, generator=random) + 3, ends, 0.1, 0.1)) == MOST_SEGMENTS
    assert len(segments(torch.ones(1, 1), torch.tensor([-1.0, 0, 1, 0]).view(4, 1, 1), 0.1, 0.1)) == 1


def test_lines_are_white_on_black() -> None:
    picture = drawn(np.array([[2.9, 3.2, 12.0, 3.2]], dtype=np.float32), (8, 20), 1)
    expected = np.zeros((8, 20, 3), dtype=np.uint8)
    expected[3, 2:13] = 255
    assert np.array_equal(picture, expected)


def test_far_outside_and_not_a_number() -> None:
    wild = np.array([[-1e12, 4, 1e12, 4], [np.nan, np.inf, -np.inf, 2]], dtype=np.float32)
    assert drawn(wild, (8, 20), 1)[4].all()
