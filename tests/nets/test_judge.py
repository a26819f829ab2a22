"""The judge's geometry: where things are found in maps, and what is cut out of pictures."""

import math

import pytest
import torch
from tests.evaluate import judged
from torch import Tensor

from reverie.nets.judge import CUT, LEAST, ROOM, STRIDE, Maps, cut_out, peaks


def maps(things: dict[tuple[int, int, int], float], cells: int = 8, pictures: int = 2) -> Maps:
    """Cells `(picture, row, column)` with their scores; sides of 1/4, offsets of a quarter cell to the right."""
    centre = torch.full((pictures, cells, cells), -6.0)
    for (n, i, j), score in things.items():
        centre[n, i, j] = math.log(score / (1 - score))
    offset = torch.zeros(pictures, 2, cells, cells)
    offset[:, 0] = 0.25
    return Maps(centre, torch.full_like(centre, math.log(0.25)), offset)


def test_peaks_are_higher_than_their_neighbours() -> None:
    seen = maps({(0, 2, 3): 0.9, (0, 2, 4): 0.8, (0, 6, 1): 0.5, (0, 0, 7): LEAST / 2, (1, 7, 7): 0.4})
    rows, places, scores = peaks(seen)
    assert rows.tolist() == [0, 0, 1]
    want = [[3.75 / 8, 2.5 / 8, 0.25], [1.75 / 8, 6.5 / 8, 0.25], [7.75 / 8, 7.5 / 8, 0.25]]
    torch.testing.assert_close(places, torch.tensor(want))
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.5, 0.4]))


def test_nothing_to_see() -> None:
    rows, places, scores = peaks(maps({}))
    assert (len(rows), places.shape, len(scores)) == (0, (0, 3), 0)
    judge = judged.judge()
    assert judge.finder.head.bias is not None
    with torch.no_grad():
        judge.finder.head.bias[0] = -50
    assert judge(torch.zeros(2, 3, 32, 32)) == [[], []]


def square(x: float, y: float, side: float, size: int = 64) -> Tensor:
    """White on black: `(3, size, size)`."""
    across = (torch.arange(size) + 0.5) / size
    inside = ((across - x).abs() < side / 2) & ((across - y).abs() < side / 2)[:, None]
    return inside.float().expand(3, -1, -1) * 2 - 1


@pytest.mark.parametrize(("x", "y", "side"), [(0.5, 0.5, 0.75), (0.25, 0.75, 0.25), (0.7, 0.3, 0.4)])
def test_a_thing_fills_what_is_cut_out(x: float, y: float, side: float) -> None:
    pixels = torch.stack([torch.full((3, 64, 64), -1.0), square(x, y, side)])
    thing = cut_out(pixels, torch.tensor([1]), torch.tensor([[x, y, side]]))[0]
    assert thing.shape == (3, CUT, CUT)
    white = (thing > 0).float()
    assert float(white.mean()) == pytest.approx(1 / ROOM**2, abs=0.08)  # an edge of one pixel more or less
    middle = torch.arange(CUT) + 0.5 - CUT / 2
    assert abs(float((white[0].sum(0) * middle).sum() / white[0].sum())) < 0.6
    assert abs(float((white[0].sum(1) * middle).sum() / white[0].sum())) < 0.6


def test_a_judge_says_something_of_every_thing_it_finds() -> None:
    judge = judged.judge()
    assert judge.finder.head.bias is not None
    with torch.no_grad():
        judge.finder.head.bias[0] = 3.0  # sees something everywhere
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = judge(pixels)
    assert [bool(one) for one in found] == [True] * 3
    for one in found[0]:
        for log_p, names in (
            (one.concept, judge.config.concepts), (one.style, judge.config.styles), (one.colour, judge.config.colours),
        ):  # fmt: skip
            assert log_p.shape == (len(names),)
            assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-5)
    alone = judge(pixels[1:2])[0]
    assert len(alone) == len(found[1])
    assert [one.x for one in alone] == pytest.approx([one.x for one in found[1]], abs=1e-5)
    assert float((alone[0].concept - found[1][0].concept).abs().max()) < 1e-5


def test_maps_are_a_quarter_as_wide_whatever_the_picture() -> None:
    found = judged.judge().finder(torch.zeros(1, 3, 48, 80))
    assert found.centre.shape == found.side.shape == (1, 48 // STRIDE, 80 // STRIDE)
    assert found.offset.shape == (1, 2, 12, 20)
    assert float(found.centre.detach().sigmoid().max()) < LEAST  # before it has learned anything


def test_pictures_that_look_alike_have_like_features() -> None:
    judge = judged.judge()
    with torch.no_grad():
        features = judge.features(torch.stack([square(0.5, 0.5, 0.5), square(0.52, 0.5, 0.5), -square(0.2, 0.2, 0.3)]))
    assert torch.allclose(features.norm(dim=1), torch.ones(3))
    assert (features[0] - features[1]).norm() < (features[0] - features[2]).norm()
