"""Pictures as preprocessors take and give them: `(H, W, 3)` uint8, RGB."""

from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reverie.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

MULTIPLE = 64  # of both sides of a resized picture: annotator/util.py of ControlNet
MOST_PIXELS = 100_000_000
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB in [0, 1]


def opencv() -> ModuleType:
    """OpenCV.

    Raises:
        RequestError: not installed.
    """
    try:
        import cv2
    except ImportError:
        raise RequestError(
            "preprocessors need OpenCV: pip install opencv-python-headless (or reverie's extra 'control')"
        ) from None
    return cv2


def checked(picture: Pixels) -> Pixels:
    """The picture itself.

    Raises:
        RequestError: not `(H, W, 3)` uint8, empty, or too large.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise RequestError(
            f"a preprocessor takes (H, W, 3) uint8 RGB; this picture is {picture.dtype} of shape {picture.shape}"
        )
    if not picture.size or picture.shape[0] * picture.shape[1] > MOST_PIXELS:
        raise RequestError(
            f"the picture is {picture.shape[1]}x{picture.shape[0]}; expected 1 to {MOST_PIXELS:,} pixels"
        )
    return picture


def checked_mask(mask: Pixels, size: tuple[int, int]) -> Pixels:
    """The mask itself.

    Raises:
        RequestError: not `(H, W)` uint8 of the picture's size.
    """
    if mask.dtype != np.uint8 or mask.shape != size:
        raise RequestError(
            f"the mask is {mask.dtype} of shape {mask.shape}; expected uint8 of the picture's shape {size}"
        )
    return mask


def detection_size(size: tuple[int, int], resolution: int | None, most: int | None) -> tuple[int, int]:
    """Height and width at which a preprocessor runs.

    Args:
        size: of the picture.
        resolution: of the shorter side, both sides rounded to multiples of 64; the picture's own if None.
        most: of the longer side, whatever was asked for.

    Raises:
        RequestError: a resolution out of range.
    """
    if resolution is not None:
        if not MULTIPLE <= resolution <= 8192:
            raise RequestError(f"resolution is {resolution}; expected {MULTIPLE} to 8192")
        scale = resolution / min(size)
        size = (_multiple(size[0] * scale), _multiple(size[1] * scale))
    if most is not None and max(size) > most:
        scale = most / max(size)
        size = (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1))
    return size


def resized(picture: Any, size: tuple[int, int], *, sharp: bool = False) -> Any:
    """A picture `(H, W)` or `(H, W, C)` of any type at another height and width.

    Smaller by the mean over areas, larger by Lanczos' kernel, as ControlNet's scripts do; `sharp` takes the nearest
    pixel.
    """
    if picture.shape[:2] == size:
        return picture
    cv2 = opencv()
    larger = size[0] * size[1] > picture.shape[0] * picture.shape[1]
    how = cv2.INTER_NEAREST if sharp else cv2.INTER_LANCZOS4 if larger else cv2.INTER_AREA
    return cv2.resize(picture, (size[1], size[0]), interpolation=how)


def rgb(gray: Any) -> Pixels:
    """One channel `(H, W)`, clipped to 0..255 and cut to whole numbers -> `(H, W, 3)`."""
    whole: Pixels = np.clip(gray, 0, 255).astype(np.uint8)
    return np.repeat(whole[:, :, None], 3, axis=2)


def gray(picture: Pixels) -> Pixels:
    """Luma of ITU-R BT.601, `(H, W)`."""
    cv2 = opencv()
    luma: Pixels = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return luma


def hint(answer: Pixels) -> "Tensor":
    """What a ControlNet is shown: `(1, 3, H, W)` float32 in [0, 1].

    The fourth channel that `inpaint` gives is 0 where the picture is to be drawn anew; there all colours are -1, as
    the inpainting ControlNet was trained (ControlNet 1.1, control_v11p_sd15_inpaint).
    """
    import torch

    values = torch.from_numpy(answer[:, :, :3].astype(np.float32) / 255)
    if answer.shape[2] == 4:
        values[torch.from_numpy(answer[:, :, 3] == 0)] = -1.0
    return values.permute(2, 0, 1)[None].contiguous()


def imagenet(picture: Pixels) -> "Tensor":
    """`(H, W, 3)` -> `(1, 3, H, W)` with ImageNet's mean and standard deviation taken out."""
    import torch

    mean, std = np.array(IMAGENET_MEAN, dtype=np.float32), np.array(IMAGENET_STD, dtype=np.float32)
    return torch.from_numpy((picture.astype(np.float32) / 255 - mean) / std).permute(2, 0, 1)[None]


def _multiple(length: float) -> int:
    return max(round(length / MULTIPLE), 1) * MULTIPLE
