"""Textual inversions inside pictures, as AUTOMATIC1111's trainer writes them: one you can look at and trade.

A picture holds one twice: as base64 of JSON in the text chunk `sd-ti-embedding`, and in its pixels, which survive sites
that strip text. The pixels: compressed JSON, low halves of its bytes in the block left of a black column, high halves
right of another, in the low four bits of each channel, exclusive-or with a linear congruential generator (Numerical
Recipes' constants). Formats: stable-diffusion-webui `modules/textual_inversion/image_embedding.py`.
"""

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from reverie.errors import CheckpointError

CHUNK = "sd-ti-embedding"
MULTIPLIER, INCREMENT, MODULUS = 1664525, 1013904223, 255
MAX_PIXELS = 1 << 25
MAX_JSON = 1 << 26  # bytes; 75 vectors of 1280 numbers are 2 MB
PICTURES = (b"\x89PNG", b"RIFF", b"\xff\xd8\xff", b"\0\0\0\x0cJXL", b"\xff\x0a")  # first bytes
Block = npt.NDArray[np.uint8]


def is_picture(path: Path) -> bool:
    """Whether a file begins as pictures do."""
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return start.startswith(PICTURES) or start[4:12] == b"ftypavif"


def read_picture(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The word that a picture calls its embedding by (it may be empty), and the vectors `(k, D)` by their names.

    Raises:
        CheckpointError: no picture, none in it, or broken.
    """
    try:
        text, pixels = _content(path)
        raw = base64.b64decode(text, validate=True) if text else _hidden(pixels)
        content = json.loads(raw)
        tables = {name: _vectors(value) for name, value in content["string_to_param"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error) as error:
        raise CheckpointError(
            f"the embedding in the picture {path} is broken: {str(error)[:80]}; get it again"
        ) from None
    name = content.get("name")
    return name if isinstance(name, str) else "", tables


def _content(path: Path) -> tuple[str, Block]:
    """The text chunk, if there is one, and the pixels `(h, w, 3)`."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise CheckpointError(f"{path} has {image.width}x{image.height} pixels; too large for an embedding")
            pixels = np.asarray(image.convert("RGB"))
            text = getattr(image, "text", {}).get(CHUNK, "")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise CheckpointError(f"cannot read the picture {path}: {str(error)[:80]}") from None
    if not text and not _blocks(pixels):
        raise CheckpointError(f"{path} is a picture without an embedding in it; expected one that a trainer wrote")
    return str(text), pixels


def _blocks(pixels: Block) -> tuple[Block, Block] | None:
    """The low and the high halves of the bytes, still scrambled; None if there are no two black columns."""
    bright = pixels.min(axis=2)
    rows, columns = np.flatnonzero(bright.max(axis=1)), np.flatnonzero(bright.max(axis=0))
    if not len(rows):
        return None
    low = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & np.uint8(0x0F)
    black = np.flatnonzero(low.max(axis=(0, 2)) == 0)
    if len(black) < 2:
        return None
    left, right = low[:, : black[0]], low[:, black[-1] + 1 :]
    return (left, right) if left.shape == right.shape and left.size else None


def _hidden(pixels: Block) -> bytes:
    """The JSON in the pixels."""
    blocks = _blocks(pixels)
    assert blocks is not None
    low, high = (block.reshape(-1) ^ _mask(block.size) for block in blocks)
    reader = zlib.decompressobj()
    found = reader.decompress((high << 4 | low).tobytes(), MAX_JSON)
    if not reader.eof:
        raise ValueError("it is cut short, or too large")
    return found


def _mask(count: int) -> Block:
    """The generator's numbers: state n from seed 0 is increment * (1 + a + ... + a^(n-1)) modulo 2^32."""
    powers = np.full(count, MULTIPLIER, dtype=np.uint32)
    powers[:1] = 1
    states = np.cumsum(np.cumprod(powers, dtype=np.uint32), dtype=np.uint32) * np.uint32(INCREMENT)
    return (states % MODULUS & 0x0F).astype(np.uint8)


def _vectors(value: Any) -> Tensor:
    return torch.tensor(value["TORCHTENSOR"], dtype=torch.float32)
