"""Metadata hidden in the lowest bit of a picture's alpha or colour channels (NovelAI, Forge, "stealth pnginfo").

Layout, column by column from the top left: 15 letters of signature, 32 bits of length in bits, then UTF-8,
gzipped where the signature ends in "comp".
"""

import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIGNATURES = {  # -> gzipped
    b"stealth_pnginfo": False, b"stealth_pngcomp": True, b"stealth_rgbinfo": False, b"stealth_rgbcomp": True,
}  # fmt: skip
HEAD = 15 + 4  # bytes of signature and length
MOST_PIXELS = 50_000_000
MOST_TEXT = 2**22  # bytes when unpacked
GZIP = 31  # zlib's number for a gzip header and the largest window


def read(image: Image.Image) -> str | None:
    """The hidden text, None if there is none that can be read. Loads the pixels."""
    if image.mode not in {"RGBA", "RGB"} or image.width * image.height > MOST_PIXELS:
        return None
    columns = np.asarray(image).transpose(1, 0, 2)  # (W, H, channels)
    kinds = [columns[..., 3:], columns[..., :3]] if image.mode == "RGBA" else [columns]
    for channels in kinds:
        hidden = _hidden(channels)
        if hidden is not None:
            return hidden
    return None


def _hidden(channels: "NDArray[np.uint8]") -> str | None:
    """The text in the lowest bits of `channels (W, H, C)`."""
    rows = -(-HEAD * 8 // (channels.shape[1] * channels.shape[2]))
    head = _bytes(channels[:rows])[:HEAD]
    packed = SIGNATURES.get(head[:15])
    length = int.from_bytes(head[15:], "big") // 8
    if packed is None or not 0 < length <= channels.size // 8 - HEAD:
        return None
    data = _bytes(channels)[HEAD : HEAD + length]
    try:
        return (_unpacked(data) if packed else data).decode()
    except (zlib.error, UnicodeDecodeError):
        return None


def _unpacked(data: bytes) -> bytes:
    """The inside of gzip.

    Raises:
        zlib.error: damaged, cut short, or more than anyone writes.
    """
    gzip = zlib.decompressobj(GZIP)
    text = gzip.decompress(data, MOST_TEXT)
    if not gzip.eof:
        raise zlib.error("no end")
    return text


def _bytes(channels: "NDArray[np.uint8]") -> bytes:
    return np.packbits(channels.reshape(-1) & 1).tobytes()
