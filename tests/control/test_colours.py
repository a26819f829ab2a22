"""Hints that are the picture itself, coarse, shuffled or with holes."""

import numpy as np
import pytest

from reverie.control.colours import smooth_field
from reverie.control.registry import Job, load_all
from reverie.errors import RequestError
from tests.control.pictures import scene

TABLE = load_all()


def test_a_tile_keeps_the_mean_and_loses_the_detail() -> None:
    picture = scene(128, 128)
    found = TABLE["tile"].run(picture, {"factor": 8})
    assert np.abs(found.mean(axis=(0, 1)) - picture.mean(axis=(0, 1))).max() < 1.5  # Lanczos rings a little
    detail = [np.abs(np.diff(p.astype(int), axis=1)).mean() for p in (found, picture)]
    assert detail[0] < 0.6 * detail[1]
    assert np.array_equal(TABLE["tile"].run(picture, {"factor": 1}), picture)


def test_blocks_of_one_colour() -> None:
    found = TABLE["colour"].run(scene(128, 192))
    blocks = found.reshape(2, 64, 3, 64, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert len(np.unique(blocks[:, 0, :, 0].reshape(-1, 3), axis=0)) > 3


def test_a_shuffle_moves_colours_by_its_seed() -> None:
    picture = scene()
    first, second = (TABLE["shuffle"].run(picture, {"seed": seed}) for seed in (1, 2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, picture)
    assert first.min() >= picture.min()
    assert first.max() <= picture.max()


@pytest.mark.parametrize("scale", [8, 256])
def test_the_flow_covers_the_picture_smoothly(scale: int) -> None:
    field = smooth_field(np.random.default_rng(3), 60, 90, scale)
    assert field.shape == (60, 90)
    assert (field.min(), field.max()) == (0, 1)
    # Neighbouring random points differ by 1 at the most, bicubically enlarged over `scale` pixels; then stretched.
    assert np.abs(np.diff(field, axis=1)).max() < (0.5 if scale == 8 else 0.1)


def test_brightness_alone() -> None:
    found = TABLE["gray"].run(scene())
    assert (found == found[:, :, :1]).all()
    luma = scene() @ np.array([0.299, 0.587, 0.114])
    assert np.abs(found[:, :, 0] - luma).max() < 1


def test_out_of_focus() -> None:
    point = np.zeros((61, 61, 3), dtype=np.uint8)
    point[30, 30] = 255
    found = TABLE["blur"].run(point, {"sigma": 2.0})[:, :, 0]
    assert abs(int(found[30, 30]) - 255 / (2 * np.pi * 4)) <= 1  # OpenCV's 8-bit kernels are in fixed point
    assert TABLE["none"].run(point).tolist() == point.tolist()


def test_inpainting_needs_a_mask_of_the_pictures_size() -> None:
    with pytest.raises(RequestError, match="needs a mask"):
        TABLE["inpaint"].run(scene())
    with pytest.raises(RequestError, match="expected uint8 of the picture's shape"):
        TABLE["inpaint"].run(scene(), job=Job(mask=np.zeros((5, 5), dtype=np.uint8)))


def test_the_hole_is_transparent_and_black() -> None:
    mask = np.zeros((72, 96), dtype=np.uint8)
    mask[10:20, 10:20] = 128
    mask[30:40] = 127
    found = TABLE["inpaint"].run(scene(), job=Job(mask=mask))
    assert np.array_equal(found[:, :, 3] == 0, mask > 127)
    assert not found[mask > 127].any()
    assert np.array_equal(found[mask <= 127][:, :3], scene()[mask <= 127])
