"""Straight lines by M-LSD: from its maps to segments, and from segments to a drawing."""

from typing import TYPE_CHECKING

import numpy as np

from reverie.control.pixels import Floats, Pixels, opencv, resized, rgb
from reverie.control.registry import Job, Option, preprocessor

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 512  # of the picture that the network sees, as it was trained
MOST_SEGMENTS = 200
ONE = 1 / 127.5 - 1  # the fourth channel: a one, scaled like a colour


@preprocessor(
    "mlsd", "MLSDdetector", "M-LSD", "hough",
    summary="straight lines, white on black", source="Gu et al. 2022 (M-LSD-large)", learned="mlsd", sharp=True,
    options=(
        Option("score", 0.1, "how sure the network is of a line's middle", 0.01, 1.0),
        Option("distance", 0.1, "least length, in pixels of 256", 0.0, 256.0),
        Option("thickness", 1, "of the lines in pixels", 1, 32),
    ),
)  # fmt: skip
def mlsd(picture: Pixels, job: Job, *, score: float, distance: float, thickness: int) -> Pixels:
    """Segments of buildings and rooms."""
    import torch

    from reverie.control.weights import mlsd as layout
    from reverie.control.weights import network

    net = network("mlsd", job.weights, job.device, layout)
    x = np.full((SIDE, SIDE, 4), ONE, dtype=np.float32)
    x[:, :, :3] = resized(picture, (SIDE, SIDE)).astype(np.float32) / 127.5 - 1
    with torch.no_grad():
        middles, ends = net(torch.from_numpy(x).permute(2, 0, 1)[None].to(job.device))
    height, width = picture.shape[:2]
    found = segments(middles[0, 0].cpu(), ends[0].cpu(), score, distance)
    scale = np.array([width, height, width, height], dtype=np.float32) / np.float32(middles.shape[-1])
    return drawn(found * scale, (height, width), thickness)


def segments(middles: "Tensor", ends: "Tensor", score: float, distance: float) -> Floats:
    """Line segments of the network's maps, the surest first (section 3.2 of the paper).

    Args:
        middles: `(h, w)` logits of a segment's middle.
        ends: `(4, h, w)`: x and y of the start, then of the end, from the middle.
        score: least probability.
        distance: least length in pixels of the map.

    Returns:
        `(N, 4)`: x, y of the start and x, y of the end; at most 200.
    """
    import torch
    import torch.nn.functional as F

    probability = middles.sigmoid()
    largest = F.max_pool2d(probability[None, None], 3, stride=1, padding=1)[0, 0]
    peaks = torch.where(probability == largest, probability, 0.0).flatten()
    best, places = peaks.topk(min(MOST_SEGMENTS, peaks.numel()))
    rows, columns = places // middles.shape[1], places % middles.shape[1]
    offsets = ends[:, rows, columns].T
    length = (offsets[:, :2] - offsets[:, 2:]).norm(dim=1)
    kept = (best > score) & (length > distance)
    middle = torch.stack([columns, rows, columns, rows], dim=1).to(offsets.dtype)
    found: Floats = (middle + offsets)[kept].numpy()
    return found


def drawn(lines: Floats, size: tuple[int, int], thickness: int) -> Pixels:
    """White lines on black; `lines (N, 4)` in pixels of a picture of that height and width."""
    cv2 = opencv()
    canvas = np.zeros(size, dtype=np.uint8)
    reach = 4 * max(size)  # OpenCV's coordinates overflow far outside
    for x0, y0, x1, y1 in np.nan_to_num(lines).clip(-reach, reach).astype(int).tolist():
        cv2.line(canvas, (x0, y0), (x1, y1), 255, thickness)
    return rgb(canvas)
