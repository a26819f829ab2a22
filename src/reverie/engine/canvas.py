"""The picture that a request begins with, its mask, and the part of it that is drawn."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from reverie.engine.request import Extend, Request
from reverie.engine.sources import read_mask, read_picture, to_tensor
from reverie.errors import RequestError

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, eq=False)
class Canvas:
    """What is drawn over.

    Attributes:
        picture: `(1, 3, H, W)` in [0, 1], the whole picture; what is kept comes from here, bit for bit.
        mask: `(1, 1, H, W)`, 1 where it is drawn, 0 where it is kept; None if all is drawn.
        alpha: `(1, 1, H, W)`, how much of the drawn picture is seen: the mask with its soft edge.
        box: the part that the network draws; may reach beyond the picture on the right and below.
        size: width and height at which the network draws it.
    """

    picture: Tensor
    mask: Tensor | None
    alpha: Tensor | None
    box: Box
    size: tuple[int, int]

    def source(self) -> Tensor:
        """What the network begins with, `(1, 3, h, w)` in [0, 1]."""
        return resized(self._cut(self.picture), self.size)

    def placed(self, other: Tensor) -> Tensor:
        """Of another picture `(1, C, ., .)`, stretched over the whole of this one, the part that is drawn."""
        return self._cut(resized(other, (self.picture.shape[-1], self.picture.shape[-2])))

    def drawn(self) -> Tensor | None:
        """The mask at the drawn size, `(1, 1, h, w)` of zeros and ones."""
        if self.mask is None:
            return None
        width, height = self.size
        return (F.adaptive_avg_pool2d(self._cut(self.mask), (height, width)) > 0).float()

    def finished(self, pixels: Tensor, keep: bool) -> Tensor:
        """Put what was drawn, `(B, 3, ., .)` at any size, in its place; outside the mask the picture stays as it was.

        Args:
            keep: whether pixels outside the mask are those of the picture.
        """
        left, top, right, bottom = self.box
        _, _, height, width = self.picture.shape
        part = resized(pixels, (right - left, bottom - top))[..., : height - top, : width - left]
        whole = self.picture.repeat(len(pixels), 1, 1, 1)
        inside = whole[..., top : top + part.shape[-2], left : left + part.shape[-1]]
        if self.alpha is None or not keep:
            inside.copy_(part)
            return whole
        alpha = self.alpha[..., top : top + part.shape[-2], left : left + part.shape[-1]]
        inside.copy_(torch.where(alpha > 0, inside + alpha * (part - inside), inside))
        return whole

    def _cut(self, image: Tensor) -> Tensor:
        left, top, right, bottom = self.box
        over = (0, max(right - image.shape[-1], 0), 0, max(bottom - image.shape[-2], 0))
        return F.pad(image, over, "replicate")[..., top:bottom, left:right]


def resized(image: Tensor, size: tuple[int, int], how: Image.Resampling = Image.Resampling.LANCZOS) -> Tensor:
    """`(B, C, H, W)` at another width and height, on the CPU; untouched where it has that size.

    By Pillow, channel by channel: its filters are those of diffusers and AUTOMATIC1111.
    """
    width, height = size
    if image.shape[-2:] == (height, width):
        return image
    pages = [Image.fromarray(page.numpy()) for page in image.reshape(-1, *image.shape[-2:]).float().cpu()]
    done = torch.stack([torch.from_numpy(np.array(page.resize((width, height), how))) for page in pages])
    return done.clamp(0, 1).reshape(*image.shape[:2], height, width)


def prepare(request: Request, factor: int, scale: int) -> Canvas | None:
    """The canvas of a request; None where it begins with noise alone.

    Args:
        factor: pixels a latent.
        scale: enlargement of the post-step upscaler: the network draws that much smaller than the picture.

    Raises:
        RequestError: pictures that cannot be read or do not fit together; an empty mask.
    """
    if request.image is None:
        for name in ("mask", "extend"):
            if getattr(request, name) is not None:
                raise RequestError(f"{name} needs a picture; give one with image")
        return None
    image = read_picture(request.image)
    mask = read_mask(request.mask, image.size) if request.mask else None
    picture = to_tensor(image.convert("RGB"))
    marked = None if mask is None else _binary(to_tensor(mask), request.mask_invert)
    if request.extend is not None:
        picture, marked = extended(picture, marked, request.extend)
    if request.mask_area == "masked" and marked is not None:
        return _around_mask(request, picture, marked, factor)
    if request.width or request.height:
        picture, marked = _fitted(request, picture, marked, scale)
    return _whole(request, picture, marked, factor * scale, scale)


def _binary(mask: Tensor, invert: bool) -> Tensor:
    drawn = (mask >= 0.5).float()  # diffusers' VaeImageProcessor binarises at 0.5
    drawn = 1 - drawn if invert else drawn
    if not drawn.any():
        raise RequestError("the mask is empty: white marks what is drawn, and nothing is white; see mask_invert")
    return drawn


def extended(picture: Tensor, mask: Tensor | None, by: Extend) -> tuple[Tensor, Tensor]:
    """A larger picture, its edges continued, and a mask of what is new.

    Raises:
        RequestError: nothing to add.
    """
    sides = (by.left, by.right, by.top, by.bottom)
    if not any(sides):
        raise RequestError("extend adds no pixels; give left, top, right or bottom")
    new = F.pad(torch.zeros_like(picture[:, :1]) if mask is None else mask, sides, value=1.0)
    larger = F.pad(picture, sides, "replicate")
    return spread(larger, F.pad(torch.zeros_like(picture[:, :1]), sides, value=1.0)), new


def spread(picture: Tensor, mask: Tensor) -> Tensor:
    """Fill what is masked with colours of its surroundings: finer and finer averages of what is known (push-pull).

    `picture (1, 3, H, W)`, `mask (1, 1, H, W)` of zeros and ones (Gortler et al. 1996, the lumigraph's push-pull).
    """
    known = 1 - mask
    if not known.any():
        return torch.full_like(picture, 0.5)
    levels = [(picture * known, known)]
    while max(levels[-1][0].shape[-2:]) > 1:
        colour, weight = levels[-1]
        pooled = F.avg_pool2d(torch.cat([colour, weight], 1), 2, ceil_mode=True, count_include_pad=False)
        levels.append((pooled[:, :-1], pooled[:, -1:]))
    filled = levels[-1][0] / levels[-1][1].clamp(min=1e-6)
    for colour, weight in reversed(levels[:-1]):
        below = F.interpolate(filled, colour.shape[-2:], mode="bilinear", align_corners=False)
        filled = torch.where(weight > 0, colour / weight.clamp(min=1e-6), below)
    return torch.where(mask > 0, filled, picture)


def soft(mask: Tensor, blur: float) -> Tensor:
    """The mask with an edge that fades on its drawn side only: 0 outside, 1 well inside.

    `blur`: standard deviation of the Gaussian in pixels.
    """
    if blur <= 0:
        return mask
    radius = max(math.ceil(3 * blur), 1)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / blur) ** 2)
    kernel /= kernel.sum()
    padded = F.pad(mask, (radius,) * 4, "replicate" if radius < min(mask.shape[-2:]) else "constant")
    across = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    blurred = F.conv2d(across, kernel.view(1, 1, -1, 1))
    return (2 * blurred - 1).clamp(0, 1) * mask


def _fitted(request: Request, picture: Tensor, mask: Tensor | None, scale: int) -> tuple[Tensor, Tensor | None]:
    """Picture and mask at the size that was asked for, stretched, cropped, or filled up with its surroundings."""
    _, _, high, wide = picture.shape
    width, height = (request.width or round(wide / scale)) * scale, (request.height or round(high / scale)) * scale
    if (wide, high) == (width, height):
        return picture, mask
    across, down = width / wide, height / high
    if request.resize == "stretch":
        inner = (width, height)
    else:
        ratio = max(across, down) if request.resize == "crop" else min(across, down)
        inner = (max(round(wide * ratio), 1), max(round(high * ratio), 1))
    picture = resized(picture, inner)
    mask = None if mask is None else (resized(mask, inner) >= 0.5).float()
    dx, dy = width - inner[0], height - inner[1]
    sides = (dx // 2, dx - dx // 2, dy // 2, dy - dy // 2)  # negative ones crop
    fitted = F.pad(picture, sides, "replicate")
    if request.resize == "fill":
        fitted = spread(fitted, F.pad(torch.zeros_like(picture[:, :1]), sides, value=1.0))
    return fitted, None if mask is None else F.pad(mask, sides)


def _whole(request: Request, picture: Tensor, mask: Tensor | None, multiple: int, scale: int) -> Canvas:
    _, _, high, wide = picture.shape
    width, height = (math.ceil(n / multiple) * multiple for n in (wide, high))
    alpha = None if mask is None else soft(mask, request.mask_blur)
    return Canvas(picture, mask, alpha, (0, 0, width, height), (width // scale, height // scale))


def _around_mask(request: Request, picture: Tensor, mask: Tensor, factor: int) -> Canvas:
    """Only the surroundings of the mask, at the full drawing size (AUTOMATIC1111's "only masked")."""
    _, _, high, wide = picture.shape
    width, height = request.width or 0, request.height or 0
    if not width or not height:
        raise RequestError("mask_area masked draws the mask's surroundings at width x height; give both")
    rows, columns = mask[0, 0].any(1).nonzero().flatten(), mask[0, 0].any(0).nonzero().flatten()
    pad = request.mask_padding
    box = (
        max(int(columns[0]) - pad, 0), max(int(rows[0]) - pad, 0),
        min(int(columns[-1]) + 1 + pad, wide), min(int(rows[-1]) + 1 + pad, high),
    )  # fmt: skip
    box = _widened(box, width / height, (wide, high))
    canvas = Canvas(picture, mask, soft(mask, request.mask_blur), box, (width, height))
    return replace(canvas, size=(math.ceil(width / factor) * factor, math.ceil(height / factor) * factor))


def _widened(box: Box, ratio: float, size: tuple[int, int]) -> Box:
    """The box with the given ratio of width to height, grown within the picture as far as that goes."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    if width / height < ratio:
        left, right = _grown(left, right, round(height * ratio), size[0])
    else:
        top, bottom = _grown(top, bottom, round(width / ratio), size[1])
    return left, top, right, bottom


def _grown(low: int, high: int, length: int, most: int) -> tuple[int, int]:
    length = min(max(length, high - low), most)
    start = min(max(low - (length - (high - low)) // 2, 0), most - length)
    return start, start + length
