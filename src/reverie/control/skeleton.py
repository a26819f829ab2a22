"""People from confidence maps and part affinity fields, and their skeletons as ControlNet's OpenPose draws them.

Cao et al. 2017, "Realtime Multi-Person 2D Pose Estimation using Part Affinity Fields", section 2.3.
"""

import math

import numpy as np
import numpy.typing as npt

from reverie.control.pixels import Floats, Pixels, opencv

JOINTS = (
    "nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist",
    "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle", "right eye", "left eye",
    "right ear", "left ear",
)  # fmt: skip  # COCO's 17 and the neck, in OpenPose's order
# Two joints and the first of the two field maps of each limb (OpenPose, poseParameters.cpp, COCO). The last two tie
# shoulders to ears: they tell whose ear it is and are not drawn.
LIMBS = (
    (1, 2, 12), (1, 5, 20), (2, 3, 14), (3, 4, 16), (5, 6, 22), (6, 7, 24), (1, 8, 0), (8, 9, 2), (9, 10, 4),
    (1, 11, 6), (11, 12, 8), (12, 13, 10), (1, 0, 28), (0, 14, 30), (14, 16, 34), (0, 15, 32), (15, 17, 36),
    (2, 16, 18), (5, 17, 26),
)  # fmt: skip
DRAWN = 17
# A circle of hues, as OpenPose colours joints and limbs in their order.
COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255),
    (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip
NEAREST = 6  # pixels: two peaks of one joint are farther apart
MOST_PEAKS = 100  # of one joint
SAMPLES = 10  # points of a limb at which its field is asked
LEAST_FIELD = 0.05  # the field's component along the limb, at which a point counts
MOST_SAMPLES = 0.8  # share of the points that must count
LEAST_JOINTS, LEAST_SCORE = 3, 0.2  # of a person; the score is a mean over its joints
DIM = 0.6  # of limbs, so that joints stand out

Joints = npt.NDArray[np.float64]  # (18, 2): x, y, NaN where a joint is not seen
Person = dict[int, int]  # joint -> which of its peaks


def people(heatmaps: Floats, fields: Floats, threshold: float) -> list[Joints]:
    """Everybody in the maps.

    Args:
        heatmaps: `(18, h, w)` confidences.
        fields: `(38, h, w)` x and y of every limb's direction.
        threshold: confidence above which a peak is a joint.

    Returns:
        for each person `(18, 2)`: x and y in pixels of the maps, NaN where a joint is not seen.
    """
    found = [peaks(heatmap, threshold) for heatmap in heatmaps]
    persons: list[Person] = []
    scores: list[float] = []
    for index, (a, b, field) in enumerate(LIMBS):
        for i, j, affinity in limbs(found[a], found[b], fields[field : field + 2]):
            _attach(persons, scores, (a, i), (b, j), affinity, only_known=index >= DRAWN)
    result: list[Joints] = []
    for person, score in zip(persons, scores, strict=True):
        total = score + sum(float(found[joint][peak, 2]) for joint, peak in person.items())
        if len(person) >= LEAST_JOINTS and total / len(person) >= LEAST_SCORE:
            result.append(_placed(person, found))
    return result


def peaks(heatmap: Floats, threshold: float) -> Floats:
    """Peaks `(N, 3)`: x, y and confidence, the surest first; larger than its four neighbours, 6 pixels apart."""
    high = np.pad(np.where(heatmap < threshold, np.float32(0), heatmap), 1)
    centre = high[1:-1, 1:-1]
    around = (high[1:-1, :-2], high[1:-1, 2:], high[:-2, 1:-1], high[2:, 1:-1])
    rows, columns = np.nonzero(np.logical_and.reduce([centre > other for other in around]))
    order = np.argsort(-heatmap[rows, columns], kind="stable")
    kept: list[tuple[int, int]] = []
    for x, y in zip(columns[order].tolist(), rows[order].tolist(), strict=True):
        if len(kept) < MOST_PEAKS and all(math.hypot(x - u, y - v) >= NEAREST for u, v in kept):
            kept.append((x, y))
    return np.array([(x, y, heatmap[y, x]) for x, y in kept], dtype=np.float32).reshape(-1, 3)


def limbs(a: Floats, b: Floats, field: Floats) -> list[tuple[int, int, float]]:
    """Which peaks of two joints are connected, each at most once: the best pairs first.

    Args:
        a, b: peaks `(N, 3)`, `(M, 3)`.
        field: `(2, h, w)` of the limb between them.

    Returns:
        index in `a`, index in `b`, affinity: equation 11 as a mean over the points that count.
    """
    if not len(a) or not len(b):
        return []
    along = _affinities(a[:, None, :2], b[None, :, :2], field)
    counts = along > LEAST_FIELD
    score = np.where(counts, along, 0).sum(axis=2) / np.maximum(counts.sum(axis=2), 1)
    rows, columns = np.nonzero(counts.mean(axis=2) > MOST_SAMPLES)
    order = np.argsort(-score[rows, columns], kind="stable")
    taken_a, taken_b = set[int](), set[int]()
    chosen: list[tuple[int, int, float]] = []
    for i, j in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if i not in taken_a and j not in taken_b:
            taken_a.add(i)
            taken_b.add(j)
            chosen.append((i, j, float(score[i, j])))
    return chosen


def _affinities(start: Floats, end: Floats, field: Floats) -> Floats:
    """The field's component along limbs at points of them, equation 10: `(N, 1, 2)`, `(1, M, 2)` -> `(N, M, 10)`."""
    limb = end - start
    direction = limb / (np.linalg.norm(limb, axis=2, keepdims=True) + 1e-6)
    points = start[:, :, None] + np.linspace(0, 1, SAMPLES)[:, None] * limb[:, :, None]
    columns, rows = np.moveaxis(np.round(points).astype(int), 3, 0)
    along: Floats = np.einsum("cnms,nmc->nms", field[:, rows, columns], direction).astype(np.float32)
    return along


def _attach(
    persons: list[Person], scores: list[float], a: tuple[int, int], b: tuple[int, int], affinity: float, *,
    only_known: bool,
) -> None:  # fmt: skip
    """Give a limb to whom one of its joints belongs; else it is somebody new, unless `only_known`.

    Where its joints belong to two persons who share no joint, they are one.
    """
    owners = [k for k, person in enumerate(persons) if person.get(a[0]) == a[1] or person.get(b[0]) == b[1]]
    if not owners:
        if not only_known:
            persons.append(dict((a, b)))
            scores.append(affinity)
        return
    first = owners[0]
    for other in reversed(owners[1:]):
        if not persons[first].keys() & persons[other].keys():
            persons[first] |= persons.pop(other)
            scores[first] += scores.pop(other)
    for joint, peak in (a, b):
        persons[first].setdefault(joint, peak)
    scores[first] += affinity


def _placed(person: Person, found: list[Floats]) -> Joints:
    joints = np.full((len(JOINTS), 2), np.nan)
    for joint, peak in person.items():
        joints[joint] = found[joint][peak, :2]
    return joints


def drawn(persons: list[Joints], size: tuple[int, int], thickness: int) -> Pixels:
    """Skeletons on black, as ControlNet's OpenPose models were trained: limbs as ellipses, joints as discs on them.

    Args:
        persons: for each `(18, 2)` x and y in pixels, NaN where a joint is not seen.
        size: height and width.
        thickness: half the width of limbs and the radius of joints; 4 in ControlNet's scripts.
    """
    cv2 = opencv()
    canvas = np.zeros((*size, 3), dtype=np.uint8)
    for limb in range(DRAWN):
        colour = tuple(int(DIM * value) for value in COLOURS[limb])
        for joints in persons:
            (x0, y0), (x1, y1) = joints[LIMBS[limb][0]], joints[LIMBS[limb][1]]
            if math.isnan(x0) or math.isnan(x1):
                continue
            middle = (int((x0 + x1) / 2), int((y0 + y1) / 2))
            half = (int(math.hypot(x1 - x0, y1 - y0) / 2), thickness)
            angle = int(math.degrees(math.atan2(y0 - y1, x0 - x1)))
            cv2.fillConvexPoly(canvas, cv2.ellipse2Poly(middle, half, angle, 0, 360, 1), colour)
    for joint, colour in enumerate(COLOURS):
        for joints in persons:
            if not math.isnan(joints[joint, 0]):
                centre = (int(joints[joint, 0]), int(joints[joint, 1]))
                cv2.circle(canvas, centre, thickness, colour, thickness=-1)
    return canvas
