"""Colours by name, and drawings in other colours."""

import numpy as np
import pytest

from reverie.train.scenes.colours import (
    COLOURS,
    NEUTRALS,
    Bytes,
    describe,
    distance,
    from_oklab,
    is_colour,
    named,
    painted,
    recolour,
    to_oklab,
)


def patch(*colours: tuple[int, int, int]) -> Bytes:
    """Vertical stripes, opaque."""
    rgba = np.full((16, 16 * len(colours), 4), 255, np.uint8)
    for n, colour in enumerate(colours):
        rgba[:, 16 * n : 16 * (n + 1), :3] = colour
    return rgba


@pytest.mark.parametrize(
    ("rgb", "lab"),  # Ottosson's matrices applied in double precision
    [
        ((255, 255, 255), (1.0, 0.0, 0.0)),
        ((255, 0, 0), (0.62796, 0.22486, 0.12585)),
        ((0, 255, 0), (0.86644, -0.23389, 0.17950)),
        ((0, 0, 255), (0.45201, -0.03246, -0.31153)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
    ],
)
def test_oklab_values(rgb: tuple[int, int, int], lab: tuple[float, float, float]) -> None:
    np.testing.assert_allclose(to_oklab(np.array(rgb, np.uint8)), lab, atol=2e-4)


def test_oklab_there_and_back() -> None:
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    # One step of 255, more only in the darkest shades, where the table of 4,096 linear values is coarser than sRGB.
    error = np.abs(from_oklab(to_oklab(colours)).astype(int) - colours)
    assert error[colours.min(axis=1) >= 15].max() <= 1
    assert error.max() <= 2


def test_distance_is_one_from_black_to_white() -> None:
    assert distance((0, 0, 0), (255, 255, 255)) == pytest.approx(1, abs=1e-3)
    assert distance((10, 200, 30), (10, 200, 30)) == 0


@pytest.mark.parametrize("colour", [*COLOURS, *NEUTRALS])
def test_every_colour_is_called_by_its_name(colour: str) -> None:
    assert describe(patch(named(colour)), ink=False).own == (colour,)
    for factor in (0.85, 0.95):
        shade = tuple(int(value * factor) for value in named(colour))
        assert describe(patch((shade[0], shade[1], shade[2])), ink=False).own[0] in {colour, "gray"}


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("before", [*COLOURS, "white"])
def test_recoloured_it_has_that_name(before: str, colour: str) -> None:
    light, dark = named(before), tuple(int(value * 0.8) for value in named(before))
    drawing = patch(light, (dark[0], dark[1], dark[2]))
    assert is_colour(recolour(drawing, colour), colour)


def test_black_white_grey_and_alpha_stay() -> None:
    drawing = patch((240, 150, 20), (250, 170, 40), (255, 255, 255), (0, 0, 0), (120, 120, 120))
    drawing[:4, :, 3] = 90
    new = recolour(drawing, "blue")
    np.testing.assert_array_equal(new[..., 3], drawing[..., 3])
    np.testing.assert_allclose(new[:, 32:, :3].astype(int), drawing[:, 32:, :3], atol=1)
    assert np.abs(new[:, :32, :3].astype(int) - drawing[:, :32, :3]).max() > 100


def test_shading_keeps_its_order() -> None:
    shades = [(60, 30, 5), (120, 60, 10), (180, 90, 15), (240, 120, 20), (250, 180, 110)]
    for colour in COLOURS:
        new = to_oklab(recolour(patch(*shades), colour)[0, ::16, :3])[:, 0]
        assert (np.diff(new) > 0).all()


def test_a_leaf_keeps_its_green() -> None:
    apple = patch(*[(220, 30, 30)] * 5, (60, 170, 60))
    new = recolour(apple, "blue")
    assert describe(new[:, :80], ink=False).own == ("blue",)
    np.testing.assert_allclose(new[:, 80:, :3].astype(int), apple[:, 80:, :3], atol=1)


def test_many_hues_are_all_recoloured() -> None:
    new = recolour(patch((220, 30, 30), (60, 170, 60), (40, 90, 220)), "purple")
    assert describe(new, ink=False).own == ("purple",)


def test_a_grey_drawing_is_shone_upon() -> None:
    new = recolour(patch((255, 255, 255), (128, 128, 128), (0, 0, 0)), "green")
    assert tuple(new[0, 0, :3]) == COLOURS["green"]
    assert tuple(new[0, 40, :3]) == (0, 0, 0)
    assert new[0, 20, 1] > new[0, 20, 0]


def test_ink_takes_every_colour() -> None:
    drawing = patch((0, 0, 0))
    assert describe(drawing, ink=True).paints == tuple(COLOURS)
    assert describe(drawing, ink=False).paints == ()
    assert tuple(painted(drawing, "pink")[3, 3]) == (*COLOURS["pink"], 255)


def test_nothing_visible_has_no_colour() -> None:
    tone = describe(np.zeros((16, 16, 4), np.uint8), ink=False)
    assert (tone.mean, tone.own, tone.paints) == ((255, 255, 255), (), ())
