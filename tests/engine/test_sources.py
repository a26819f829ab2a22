"""Pictures of every kind come out upright, in RGB or L, or are refused in one line."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reverie.engine.sources import data_url, read_mask, read_picture, to_tensor
from reverie.errors import RequestError


def _saved(image: Image.Image, path: Path, **options: Any) -> str:
    image.save(path, **options)
    return str(path)


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    """Red grows to the right, green downwards."""
    array = np.zeros((height, width, 3), np.uint8)
    array[..., 0] = np.linspace(0, 255, width)[None, :]
    array[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(array)


@pytest.mark.parametrize("ending", ["png", "webp", "bmp", "tiff", "ppm"])
def test_lossless_formats_are_read_exactly(tmp_path: Path, ending: str) -> None:
    options = {"lossless": True} if ending == "webp" else {}
    read = read_picture(_saved(gradient(), tmp_path / f"a.{ending}", **options))
    assert read.mode == "RGB"
    assert np.array_equal(np.asarray(read), np.asarray(gradient()))


def test_data_url_round_trip() -> None:
    assert np.array_equal(np.asarray(read_picture(data_url(gradient()))), np.asarray(gradient()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    turned = gradient().transpose(undo[orientation]) if orientation in undo else gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = read_picture(_saved(turned, tmp_path / "a.png", exif=exif))
    assert np.array_equal(np.asarray(read), np.asarray(gradient()))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    read = read_picture(_saved(Image.fromarray(values), tmp_path / "a.png"))
    assert np.asarray(read.convert("L")).tolist() == [[0, 1, 128, 255]]


def test_float_pictures_are_read(tmp_path: Path) -> None:
    read = read_picture(_saved(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), tmp_path / "a.tiff"))
    assert np.asarray(read.convert("L")).tolist() == [[0, 128, 255]]


def test_transparency_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    read = read_picture(_saved(image, tmp_path / "a.png"))
    assert [read.getpixel((0, 0)), read.getpixel((1, 0))] == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["CMYK", "P", "1", "LA", "YCbCr"])
def test_other_modes_become_plain(tmp_path: Path, mode: str) -> None:
    ending = {"CMYK": "jpg", "YCbCr": "jpg"}.get(mode, "png")
    read = read_picture(_saved(gradient().convert(mode), tmp_path / f"a.{ending}"))
    assert read.mode in {"RGB", "L"}
    assert read.size == (24, 16)
    wanted = np.asarray(gradient().convert("L" if mode in {"LA", "1"} else "RGB").convert(read.mode), float)
    if mode != "1":
        assert np.abs(np.asarray(read, float) - wanted).mean() < 20  # palettes, JPEG and CMYK lose some


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert read_picture(str(path)).getpixel((0, 0)) == (255, 0, 0)


def _bomb(width: int, height: int) -> bytes:
    """A PNG header that promises more pixels than anybody has."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"hello", "is not a picture"),
        (_bomb(60000, 60000), "at most 100,000,000 pixels"),
        (_bomb(20000, 20000), "at most 100,000,000 pixels"),
        (_bomb(0, 10), "cannot be read"),
        (b"<html><body>404</body></html>", "is not a picture"),
    ],
    ids=["empty", "text", "bomb", "large", "no width", "web page"],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(RequestError) as error:
        read_picture(str(path))
    assert said in str(error.value) or "not a picture" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [10, 40, 60, 100])
def test_truncated_pictures_are_refused(tmp_path: Path, kept: int) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) * kept // 110])
    with pytest.raises(RequestError, match="image"):
        read_picture(str(path))


@pytest.mark.parametrize("source", ["missing.png", "data:image/png,abc", "data:image/png;base64,@@@", "."])
def test_no_picture_at_all(source: str) -> None:
    with pytest.raises(RequestError, match="image"):
        read_picture(source)


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    path = _saved(Image.new("L", (8, 8), 255), tmp_path / "m.png")
    with pytest.raises(RequestError, match="the mask is 8x8, the picture 16x8"):
        read_mask(path, (16, 8))


def test_to_tensor_is_exact() -> None:
    tensor = to_tensor(gradient())
    assert tensor.shape == (1, 3, 16, 24)
    assert torch.equal((tensor[0] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(gradient())))
