"""Pictures as hints in themselves: coarse, in blocks, shuffled, with holes, or as they are."""

import numpy as np
import numpy.typing as npt

from reverie.control.pixels import Floats, Pixels, gray, opencv, resized, rgb
from reverie.control.registry import Job, Option, preprocessor
from reverie.errors import RequestError


@preprocessor(
    "tile", "tile_resample", "TileDetector",
    summary="the picture without its detail", source="ControlNet 1.1 tile: reduced, then enlarged",
    options=(Option("factor", 8.0, "how many times smaller it is made; 1 leaves it as it is", 1.0, 64.0),),
)  # fmt: skip
def tile(picture: Pixels, job: Job, *, factor: float) -> Pixels:
    """Reduced by the mean over areas, then enlarged again."""
    height, width = picture.shape[:2]
    small = resized(picture, (max(round(height / factor), 1), max(round(width / factor), 1)))
    coarse: Pixels = resized(small, (height, width))
    return coarse


@preprocessor(
    "blur", "blur_gaussian", "tile_blur",
    summary="the picture out of focus", source="Gaussian blur",
    options=(Option("sigma", 9.0, "standard deviation in pixels", 0.1, 64.0),),
)  # fmt: skip
def blur(picture: Pixels, job: Job, *, sigma: float) -> Pixels:
    """For the ControlNets that sharpen."""
    soft: Pixels = opencv().GaussianBlur(picture, (0, 0), sigma)
    return soft


@preprocessor(
    "colour", "color", "color_grid", "t2ia_color_grid", "ColorDetector",
    summary="a grid of mean colours", source="Mou et al. 2023 (T2I-Adapter), its colour adapter: blocks of 64 pixels",
    options=(Option("block", 64, "side of a block in pixels", 1, 1024),), sharp=True,
)  # fmt: skip
def colour(picture: Pixels, job: Job, *, block: int) -> Pixels:
    """Every block in its mean colour, which the adapter's training took by a bicubic reduction."""
    cv2 = opencv()
    height, width = picture.shape[:2]
    few = (max(width // block, 1), max(height // block, 1))
    means = cv2.resize(picture, few, interpolation=cv2.INTER_CUBIC)
    grid: Pixels = cv2.resize(means, (width, height), interpolation=cv2.INTER_NEAREST)
    return grid


@preprocessor(
    "shuffle", "ContentShuffleDetector",
    summary="the picture's colours and textures, without its composition",
    source="ControlNet 1.1 shuffle: a smooth random flow",
    options=(Option("seed", 0, "of the flow", 0, 2**63 - 1),
             Option("scale", 256, "pixels between the flow's random points", 8, 2048)),
)  # fmt: skip
def shuffle(picture: Pixels, job: Job, *, seed: int, scale: int) -> Pixels:
    """Every pixel from where two smooth random fields say, which cover the whole picture."""
    cv2 = opencv()
    height, width = picture.shape[:2]
    random = np.random.default_rng(seed)
    across = smooth_field(random, height, width, scale) * (width - 1)
    down = smooth_field(random, height, width, scale) * (height - 1)
    moved: Pixels = cv2.remap(picture, across, down, cv2.INTER_LINEAR)
    return moved


@preprocessor(
    "inpaint", "inpaint_only", "inpaint_global_harmonious", "InpaintDetector",
    summary="the picture with a hole where it is to be drawn anew", sharp=True,
    source="ControlNet 1.1 inpaint: masked pixels are -1",
)  # fmt: skip
def inpaint(picture: Pixels, job: Job) -> Pixels:
    """`(H, W, 4)`: black and transparent where the mask is, opaque elsewhere; `reverie.control.pixels.hint` reads it.

    Raises:
        RequestError: no mask.
    """
    if job.mask is None:
        raise RequestError(
            "preprocessor inpaint needs a mask, white where the picture is to be drawn anew: --mask FILE"
        )
    kept: npt.NDArray[np.bool_] = job.mask <= 127
    return np.dstack([picture * kept[:, :, None], kept.astype(np.uint8) * 255])


@preprocessor("gray", "grey", "recolor_luminance", "recolour", summary="brightness alone", source="ITU-R BT.601 luma")
def grayscale(picture: Pixels, job: Job) -> Pixels:
    """For the ControlNets that colour a picture."""
    return rgb(gray(picture))


@preprocessor(
    "none", "reference_only", "reference", "passthrough", "identity",
    summary="the picture as it is", source="for pictures that are hints already, and for reference",
)  # fmt: skip
def none(picture: Pixels, job: Job) -> Pixels:
    """The picture as it is."""
    return picture.copy()


def smooth_field(random: np.random.Generator, height: int, width: int, scale: int) -> Floats:
    """A smooth random field `(H, W)` from 0 to 1: random points `scale` pixels apart, enlarged bicubically."""
    cv2 = opencv()
    points = random.random((height // scale + 2, width // scale + 2), dtype=np.float32)
    large = cv2.resize(points, (width + 2 * scale, height + 2 * scale), interpolation=cv2.INTER_CUBIC)
    field: Floats = large[scale : scale + height, scale : scale + width]
    low, high = float(field.min()), float(field.max())
    return np.ascontiguousarray((field - low) / max(high - low, 1e-6), dtype=np.float32)
