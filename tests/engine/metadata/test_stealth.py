"""Metadata in the lowest bit of pixels."""

import gzip
import json
import zlib

import numpy as np
import pytest
from PIL import Image

from reverie.engine.metadata import stealth
from tests.engine.metadata import samples


def hide(text: bytes, kind: str, size: tuple[int, int] = (96, 64), length: int | None = None) -> Image.Image:
    """A picture with `text` in its alpha or colour channels."""
    data = gzip.compress(text) if kind.endswith("comp") else text
    head = f"stealth_{kind}".encode() + (len(data) * 8 if length is None else length).to_bytes(4, "big")
    bits = np.unpackbits(np.frombuffer(head + data, np.uint8))
    channels = 3 if kind.startswith("rgb") else 1
    mode = "RGB" if kind.startswith("rgb") else "RGBA"
    pixels = np.full((size[0], size[1], len(mode)), 200, np.uint8)  # columns first, as it is read
    part = pixels[..., -channels:].reshape(-1) & 0xFE
    part[: len(bits)] |= bits[: len(part)]
    pixels[..., -channels:] = part.reshape(*size, channels)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 0, 2)))


@pytest.mark.parametrize("kind", ["pnginfo", "pngcomp", "rgbinfo", "rgbcomp"])
def test_every_kind(kind: str) -> None:
    assert stealth.read(hide(samples.A1111.encode(), kind)) == samples.A1111


@pytest.mark.filterwarnings("ignore:Image.Image.getdata:DeprecationWarning")  # in sd_parsers
def test_it_is_what_sd_parsers_reads() -> None:
    from sd_parsers.extractors._png_stenographic_alpha import LSBExtractor

    picture = hide(json.dumps({"a": "é"}).encode(), "pngcomp")
    assert stealth.read(picture) == LSBExtractor.extract_from(picture)


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("RGBA", (64, 64)), Image.new("RGB", (1, 1)), Image.new("L", (64, 64)), Image.new("RGBA", (1, 1)),
        hide(b"text", "pnginfo", length=2**32 - 1), hide(b"text", "pnginfo", length=0), hide(b"\xff\xfe", "pnginfo"),
        hide(b"text", "pngcomp", length=8),
    ],
)  # fmt: skip
def test_nothing_that_can_be_read(picture: Image.Image) -> None:
    assert stealth.read(picture) is None


@pytest.mark.parametrize(("length", "whole"), [(stealth.MOST_TEXT - 1, True), (4 * stealth.MOST_TEXT, False)])
def test_a_bomb_is_not_read(length: int, whole: bool) -> None:
    assert (stealth.read(hide(b"a" * length, "pngcomp", (512, 512))) is not None) == whole


def test_damaged_gzip() -> None:
    picture = hide(b"text" * 100, "pngcomp")
    pixels = np.asarray(picture).copy()
    pixels[:, 3:, 3] ^= 1
    with pytest.raises(zlib.error):  # so that the test means something
        zlib.decompress(np.packbits(pixels.transpose(1, 0, 2)[..., 3].reshape(-1) & 1).tobytes()[19:], 31)
    assert stealth.read(Image.fromarray(pixels)) is None
