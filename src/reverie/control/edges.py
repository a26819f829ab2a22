"""Edges and lines by filters: Canny, differences of Gaussians, and what makes scribbles of soft edges."""

from typing import Any

import numpy as np

from reverie.control.pixels import Floats, Pixels, gray, opencv, rgb
from reverie.control.registry import Job, Option, preprocessor

EXTENSION = "AUTOMATIC1111's ControlNet extension"


@preprocessor(
    "canny", "CannyDetector", "CannyEdgeDetector",
    summary="thin edges, white on black", source="Canny 1986", sharp=True,
    options=(
        Option("low", 100, "gradients below it are no edge", 1, 255),
        Option("high", 200, "gradients above it are an edge; between both, what is connected to one", 1, 255),
    ),
)  # fmt: skip
def canny(picture: Pixels, job: Job, *, low: int, high: int) -> Pixels:
    """Edges by gradient, non-maximum suppression and hysteresis; the gradient is the strongest channel's."""
    return rgb(opencv().Canny(picture, low, high))


@preprocessor(
    "lineart", "lineart_standard", "lineart_standard (from white bg & black line)", "LineartStandardDetector",
    summary="line art, white on black", source=f"{EXTENSION}, lineart_standard: a difference of Gaussians",
    options=(
        Option("sigma", 6.0, "width of the blur that lines are darker than", 0.5, 64.0),
        Option("floor", 8, "differences up to it are paper", 0, 128),
    ),
)  # fmt: skip
def lineart(picture: Pixels, job: Job, *, sigma: float, floor: int) -> Pixels:
    """How much darker a pixel is than its surroundings, so scaled that the typical line is 127.

    It is meant for drawings with dark lines on bright paper, and works on photographs with clear outlines.
    """
    values = picture.astype(np.float32)
    darker = (_blurred(values, sigma) - values).min(axis=2).clip(0, 255)
    lines = darker[darker > floor]
    typical = max(16.0, float(np.median(lines))) if lines.size else 16.0
    return rgb(darker / typical * 127)


@preprocessor(
    "scribble_xdog", "XDoG",
    summary="a scribble, white on black", sharp=True,
    source=f"Winnemöller et al. 2012 (XDoG), with the constants of {EXTENSION}",
    options=(
        Option("threshold", 32, "differences up to half of it are paper", 1, 64),
        Option("fine", 0.5, "standard deviation of the narrow Gaussian", 0.1, 16.0),
        Option("coarse", 5.0, "standard deviation of the wide Gaussian", 0.2, 64.0),
    ),
)  # fmt: skip
def scribble_xdog(picture: Pixels, job: Job, *, threshold: int, fine: float, coarse: float) -> Pixels:
    """Where all channels of a narrow blur are darker than of a wide one."""
    values = picture.astype(np.float32)
    darker = (_blurred(values, coarse) - _blurred(values, fine)).min(axis=2).clip(0, 255)
    darker = 255 - (255 - darker).astype(np.uint8).astype(np.float32)  # the reference rounds here
    return rgb(np.where(2 * darker > threshold, 255, 0))


@preprocessor(
    "scribble", "scribble_canny", "fake_scribble",
    summary="a scribble from edges, white on black", source="Canny 1986; thick lines as in ControlNet 1.1's scribbles",
    sharp=True,
    options=(
        Option("low", 60, "as of canny", 1, 255),
        Option("high", 160, "as of canny", 1, 255),
        Option("thickness", 3.0, "standard deviation of the blur that thickens lines", 0.3, 16.0),
    ),
)  # fmt: skip
def scribble(picture: Pixels, job: Job, *, low: int, high: int, thickness: float) -> Pixels:
    """Edges of the smoothed picture, thickened: what a person draws with a pen. Needs no weights; see scribble_hed."""
    cv2 = opencv()
    smooth = cv2.bilateralFilter(picture, 9, 75, 75)
    return rgb(thickened(cv2.Canny(smooth, low, high).astype(np.float32), thickness))


@preprocessor(
    "threshold", "binary", "BinaryDetector",
    summary="black and white at a brightness", source="Otsu 1979 where no threshold is given", sharp=True,
    options=(Option("threshold", 0, "brightness above which it is white; 0 chooses by Otsu's method", 0, 255),
             Option("invert", False, "dark becomes white")),
)  # fmt: skip
def binary(picture: Pixels, job: Job, *, threshold: int, invert: bool) -> Pixels:
    """Two tones."""
    cv2 = opencv()
    how = cv2.THRESH_BINARY_INV if invert else cv2.THRESH_BINARY
    how |= cv2.THRESH_OTSU if threshold == 0 else 0
    return rgb(cv2.threshold(gray(picture), threshold, 255, how)[1])


@preprocessor(
    "invert", "invert (from white bg & black line)", "scribble_invert", "InvertDetector",
    summary="a drawing on white as one on black", source="ControlNet 1.1: its line models were trained on black",
)  # fmt: skip
def invert(picture: Pixels, job: Job) -> Pixels:
    """Every channel from 255 down."""
    return 255 - picture


def ridges(soft: Floats, sigma: float) -> Floats:
    """Soft edges `(H, W)`, blurred and thinned to their ridges.

    A pixel stays where it is the largest of three in a row in one of four directions at least.
    """
    cv2 = opencv()
    smooth = cv2.GaussianBlur(soft, (0, 0), sigma)
    row = np.array([[0, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=np.uint8)
    diagonal = np.eye(3, dtype=np.uint8)
    kept = np.zeros(smooth.shape, dtype=bool)
    for line in (row, row.T, diagonal, diagonal[::-1]):
        kept |= cv2.dilate(smooth, np.ascontiguousarray(line)) == smooth
    thin: Floats = np.where(kept, smooth, np.float32(0))
    return thin


def thickened(lines: Any, sigma: float) -> Pixels:
    """Lines `(H, W)` of 0 and 255, made thick: 255 wherever their blur is above 4 (ControlNet 1.1's scribbles)."""
    thick: Pixels = np.where(_blurred(lines, sigma) > 4, 255, 0).astype(np.uint8)
    return thick


def _blurred(values: Any, sigma: float) -> Floats:
    blurred: Floats = opencv().GaussianBlur(values, (0, 0), sigma)
    return blurred
