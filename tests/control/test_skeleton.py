"""People from maps that were drawn from known people, and skeletons in their colours."""

import numpy as np
import pytest

from reverie.control.pixels import Floats
from reverie.control.skeleton import COLOURS, JOINTS, LIMBS, MOST_PEAKS, Joints, drawn, limbs, peaks, people

HEIGHT, WIDTH = 120, 160
# Nose, neck, right arm, left arm, right leg, left leg, eyes, ears: somebody who faces us, 80 pixels tall.
STANDING = np.array(
    [(0, 0), (0, 14), (-12, 14), (-16, 28), (-18, 42), (12, 14), (16, 28), (18, 42), (-8, 42), (-9, 60), (-9, 78),
     (8, 42), (9, 60), (9, 78), (-4, -6), (4, -6), (-10, -2), (10, -2)], dtype=float)  # fmt: skip


def at(x: float, y: float, scale: float = 1.0) -> Joints:
    """Somebody whose nose is there."""
    return np.add(STANDING * scale, (x, y))


def maps(persons: list[Joints], missing: tuple[int, ...] = ()) -> tuple[Floats, Floats]:
    """A perfect network's answer: Gaussians at the joints, unit vectors along the limbs (Cao et al., eq. 6 and 8)."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    heat = np.zeros((18, HEIGHT, WIDTH), dtype=np.float32)
    fields = np.zeros((38, HEIGHT, WIDTH), dtype=np.float32)
    for joints in persons:
        for joint, (x, y) in enumerate(joints):
            if joint not in missing:
                blob = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 2.0**2))
                heat[joint] = np.maximum(heat[joint], blob)
        for a, b, field in LIMBS:
            step = joints[b] - joints[a]
            length = np.hypot(*step)
            x, y = columns - joints[a][0], rows - joints[a][1]
            along, across = (x * step[0] + y * step[1]) / length, np.abs(x * step[1] - y * step[0]) / length
            on = (along >= -1) & (along <= length + 1) & (across < 2)
            fields[field, on], fields[field + 1, on] = step / length
    return heat, fields


def test_one_person_comes_back() -> None:
    person = at(80, 20)
    (found,) = people(*maps([person]), threshold=0.1)
    np.testing.assert_allclose(found, person)


def test_two_people_are_kept_apart() -> None:
    persons = [at(50, 20), at(110, 25, 0.9)]
    found = sorted(people(*maps([p.round() for p in persons]), threshold=0.1), key=lambda joints: joints[0, 0])
    assert len(found) == 2
    for joints, person in zip(found, persons, strict=True):
        np.testing.assert_allclose(joints, person.round())


def test_a_joint_that_is_not_seen_is_nan_and_the_rest_stays_together() -> None:
    person = at(80, 20)
    (found,) = people(*maps([person], missing=(3, 4)), threshold=0.1)
    assert np.isnan(found[[3, 4]]).all()
    seen = [joint for joint in range(18) if joint not in (3, 4)]
    np.testing.assert_allclose(found[seen], person[seen])


def test_without_the_neck_the_ears_tie_arms_to_the_head() -> None:
    """Parts whose only connection is a limb that nobody draws: no new persons come from it."""
    found = people(*maps([at(80, 20)], missing=(1,)), threshold=0.1)
    assert all(np.isnan(joints[1]).all() for joints in found)
    assert sum(np.count_nonzero(~np.isnan(joints[:, 0])) for joints in found) <= 17


def test_nobody() -> None:
    heat, fields = np.zeros((18, 20, 20), np.float32), np.zeros((38, 20, 20), np.float32)
    assert people(heat, fields, 0.1) == []
    heat[0, 5, 5] = 1  # a nose alone is nobody
    assert people(heat, fields, 0.1) == []


def test_peaks_are_apart_and_sure() -> None:
    heat = np.zeros((30, 30), dtype=np.float32)
    for x, y, value in ((5, 5, 0.5), (8, 5, 0.9), (20, 20, 0.3), (0, 29, 0.7), (10, 25, 0.05)):
        heat[y, x] = value
    np.testing.assert_allclose(peaks(heat, 0.1), [(8, 5, 0.9), (0, 29, 0.7), (20, 20, 0.3)])


def test_noise_is_bounded() -> None:
    noise = np.random.default_rng(0).random((200, 200)).astype(np.float32)
    assert len(peaks(noise, 0.1)) == MOST_PEAKS


def test_a_limb_against_its_field_is_none() -> None:
    a, b = np.array([[5, 5, 1]], np.float32), np.array([[15, 5, 1]], np.float32)
    field = np.zeros((2, 20, 20), dtype=np.float32)
    field[0] = 1
    ((i, j, affinity),) = limbs(a, b, field)
    assert (i, j) == (0, 0)
    assert affinity == pytest.approx(1, abs=1e-5)
    assert limbs(b, a, field) == []
    field[0, :, 8:12] = 0  # three or four of ten points have no field
    assert limbs(a, b, field) == []
    assert limbs(a[:0], b, field) == []


def test_colours_and_limbs_are_openposes() -> None:
    assert len(COLOURS) == len(JOINTS) == 18
    canvas = drawn([at(80, 20)], (HEIGHT, WIDTH), 4)
    for joint, (x, y) in enumerate(at(80, 20).astype(int)):
        if joint not in (0, 14, 15):  # nose and eyes are nearer than their discs are wide
            assert tuple(canvas[y, x]) == COLOURS[joint], JOINTS[joint]
    assert tuple(canvas[34, 74]) == (153, 0, 0)  # neck to right shoulder: 0.6 of red
    assert tuple(canvas[34, 86]) == (153, 51, 0)
    used = {tuple(colour) for colour in canvas.reshape(-1, 3)} - {(0, 0, 0)}
    assert used <= {*COLOURS, *(tuple(int(0.6 * v) for v in colour) for colour in COLOURS)}


def test_outside_the_picture_nothing_breaks() -> None:
    assert drawn([STANDING * 100], (20, 20), 4).shape == (20, 20, 3)
    assert not drawn([np.full((18, 2), np.nan)], (20, 20), 4).any()
