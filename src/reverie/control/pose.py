"""Poses of people by lightweight OpenPose."""

from typing import Any

import numpy as np

from reverie.control.pixels import Floats, Pixels, opencv
from reverie.control.registry import Job, Option, preprocessor
from reverie.control.skeleton import drawn, people

STRIDE, ENLARGE = 8, 4  # pixels a place of the maps; how much the maps are enlarged before peaks are sought
GREY = 128  # what the network takes for nothing, and for what is around the picture


@preprocessor(
    "openpose", "openpose_light", "pose", "openpose_body", "OpenposeDetector",
    summary="skeletons of people in OpenPose's colours, on black", learned="openpose_light", sharp=True,
    source="Osokin 2018 (Lightweight OpenPose); Cao et al. 2017 (part affinity fields)",
    options=(
        Option("height", 368, "of the picture that the network sees; more finds smaller people", 128, 1024),
        Option("threshold", 0.1, "confidence above which a joint counts", 0.01, 1.0),
        Option("thickness", 4, "half the width of limbs, and radius of joints, in pixels", 1, 64),
    ),
)  # fmt: skip
def openpose(picture: Pixels, job: Job, *, height: int, threshold: float, thickness: int) -> Pixels:
    """Body, eyes and ears; hands and faces need networks whose weights are not openly licensed."""
    heatmaps, fields, scale = maps(picture, job, height)
    found = [joints / scale for joints in people(heatmaps, fields, threshold)]
    return drawn(found, (picture.shape[0], picture.shape[1]), thickness)


def maps(picture: Pixels, job: Job, height: int) -> tuple[Floats, Floats, float]:
    """Confidence maps `(18, h, w)`, fields `(38, h, w)`, and pixels of these maps a pixel of the picture."""
    import torch

    from reverie.control.weights import network
    from reverie.control.weights import openpose_light as layout

    cv2 = opencv()
    net = network("openpose_light", job.weights, job.device, layout)
    scale = min(height / picture.shape[0], 4 * height / picture.shape[1])  # a panorama is kept small
    size = (max(round(picture.shape[1] * scale), 1), max(round(picture.shape[0] * scale), 1))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)
    padded = _padded(small)
    x = torch.from_numpy((padded[:, :, ::-1].astype(np.float32) - GREY) / 256).permute(2, 0, 1)[None]
    with torch.no_grad():
        heatmaps, fields = net(x.to(job.device))
    return _enlarged(heatmaps[0, :18]), _enlarged(fields[0]), scale * ENLARGE / STRIDE


def _padded(picture: Any) -> Any:
    """Grey at the right and below, so that both sides are multiples of the stride."""
    height, width = picture.shape[:2]
    down, right = -height % STRIDE, -width % STRIDE
    return np.pad(picture, ((0, down), (0, right), (0, 0)), constant_values=GREY)


def _enlarged(values: Any) -> Floats:
    """`(C, h, w)` -> `(C, 4h, 4w)`, bicubically."""
    cv2 = opencv()
    planes = values.float().cpu().numpy()
    size = (planes.shape[2] * ENLARGE, planes.shape[1] * ENLARGE)
    return np.stack([cv2.resize(plane, size, interpolation=cv2.INTER_CUBIC) for plane in planes])
