"""Line art by a network that learned to draw; `lineart` of `reverie.control.edges` does without."""

import numpy as np

from reverie.control.pixels import Pixels, rgb
from reverie.control.registry import Job, preprocessor

LEAST = 16  # pixels: below it nothing is left of the inner layers, whose norms need more than one place
MOST = 2048


@preprocessor(
    "lineart_realistic", "lineart_informative", "LineartDetector",
    summary="line art as a person would draw it, white on black", learned="line_drawing", most=MOST,
    source="Chan et al. 2022 (informative drawings)",
)  # fmt: skip
def lineart_realistic(picture: Pixels, job: Job) -> Pixels:
    """Outlines and creases of photographs, as ControlNet 1.1's line-art model was trained."""
    import torch

    from reverie.control.weights import line_drawing as layout
    from reverie.control.weights import network
    from reverie.nets.line_drawing import FACTOR

    net = network("line_drawing", job.weights, job.device, layout)
    height, width = picture.shape[:2]
    down, right = (max(-length % FACTOR, LEAST - length) for length in (height, width))
    padded = np.pad(picture, ((0, down), (0, right), (0, 0)), mode="edge").astype(np.float32) / 255
    with torch.no_grad():
        paper = net(torch.from_numpy(padded).permute(2, 0, 1)[None].to(job.device))[0, 0, :height, :width]
    return rgb(255 - np.floor(paper.cpu().numpy() * 255))
