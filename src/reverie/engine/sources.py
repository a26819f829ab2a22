"""Pictures that a request begins with: read safely whatever they are, brought to one form."""

import base64
import binascii
import io
import warnings
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from reverie.errors import RequestError

MOST_PIXELS = 100_000_000  # of a picture to read; a decompression bomb says more in its first bytes
MOST_BYTES = 512 * 2**20
DEEP = {"I;16", "I;16L", "I;16B", "I;16N", "I"}  # modes of pictures with 16 bits a channel


def read_picture(source: str, field: str = "image") -> Image.Image:
    """A picture from a file or a `data:` URL: the first frame, upright, in RGB or L, transparency on white.

    Args:
        field: the request's field it comes from, for messages.

    Raises:
        RequestError: not there, not a picture, truncated, empty or too large.
    """
    what = f"{field} {source if len(source) <= 100 else source[:40] + '...'}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs, odd tags and ICC profiles; sizes are checked here
            with Image.open(_opened(source, what)) as image:
                _check_size(image, what)
                image.load()
                return _plain(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise RequestError(f"{what} is not a picture that can be read; PNG, JPEG and WebP can") from None
    except Image.DecompressionBombError:
        raise RequestError(f"{what} is too large; at most {MOST_PIXELS:,} pixels are read") from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(f"{what} cannot be read: {reason}") from None


def read_mask(source: str, size: tuple[int, int]) -> Image.Image:
    """A mask in L, white where the picture is drawn. `size` is the picture's width and height.

    Raises:
        RequestError: as `read_picture`, or of another size than the picture.
    """
    mask = read_picture(source, "mask").convert("L")
    if mask.size != size:
        raise RequestError(f"the mask is {mask.width}x{mask.height}, the picture {size[0]}x{size[1]}; make them equal")
    return mask


def to_tensor(image: Image.Image) -> Tensor:
    """RGB or L -> `(1, C, H, W)` float32 in [0, 1]."""
    array = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(array.reshape(image.height, image.width, -1)).permute(2, 0, 1)[None].contiguous()


def data_url(image: Image.Image) -> str:
    """A picture as a `data:` URL (PNG), the form in which a request carries one that is not a file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _opened(source: str, what: str) -> IO[bytes] | Path:
    if source.startswith("data:"):
        head, _, body = source.partition(",")
        if not head.endswith(";base64"):
            raise RequestError(f"{what}: a data: URL must be base64, as in data:image/png;base64,...")
        try:
            return io.BytesIO(base64.b64decode(body, validate=True))
        except binascii.Error as error:
            raise RequestError(f"{what}: not base64 ({error})") from None
    path = Path(source).expanduser()
    if not path.exists():
        raise RequestError(f"{what} is not there")
    if not path.is_file():
        raise RequestError(f"{what} is not a file")
    size = path.stat().st_size
    if size == 0:
        raise RequestError(f"{what} is empty (0 bytes)")
    if size > MOST_BYTES:
        raise RequestError(f"{what} has {size:,} bytes; at most {MOST_BYTES:,} are read")
    return path


def _check_size(image: Image.Image, what: str) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise RequestError(f"{what} is {image.width}x{image.height}; at most {MOST_PIXELS:,} pixels are read")
    if not image.width or not image.height:
        raise RequestError(f"{what} is {image.width}x{image.height}; it has no pixels")


def _plain(image: Image.Image) -> Image.Image:
    """RGB or L with 8 bits a channel; what is transparent becomes white."""
    if image.mode in DEEP:
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = 1.0 if values.max(initial=0) <= 1 else 255.0
        return Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "L" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def to_picture(pixels: Tensor) -> Image.Image:
    """`(1, 3, H, W)` in [0, 1] -> RGB, the inverse of `to_tensor`."""
    rounded = (pixels[0] * 255).round().clamp(0, 255).byte()
    return Image.fromarray(rounded.permute(1, 2, 0).cpu().numpy())
