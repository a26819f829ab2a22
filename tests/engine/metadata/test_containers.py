"""Text in pictures of every format, both ways."""

import io
import os
import struct
import sys
import warnings
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from reverie.engine.metadata import containers
from reverie.engine.metadata.containers import MOST_TEXT, OWN, PARAMETERS, Carried, read, save_parameters
from reverie.errors import RequestError
from tests.engine.metadata import samples

OURS = {PARAMETERS: "ein Apfel 🍎\nSteps: 20", OWN: '{"schema": 1}'}
EXIF = ["JPEG", "WEBP", *(["AVIF"] if features.check("avif") else [])]


def saved(kind: str, mode: str = "RGB", **options: object) -> io.BytesIO:
    buffer = io.BytesIO()
    Image.new(mode, (16, 16)).save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("kind", ["PNG", *EXIF])
def test_both_texts_are_read_back(kind: str) -> None:
    carried = read(saved(kind, **save_parameters(kind, OURS)))
    assert carried.texts[PARAMETERS] == OURS[PARAMETERS]
    assert carried.texts[OWN] == OURS[OWN]
    assert carried.size == (16, 16)


def test_a_gif_carries_the_parameters() -> None:
    assert read(saved("GIF", **save_parameters("GIF", OURS))).texts == {"comment": OURS[PARAMETERS]}


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM"])
def test_other_formats_carry_nothing(kind: str) -> None:
    assert save_parameters(kind, OURS) == {}
    assert save_parameters("PNG", {}) == {}


@pytest.mark.parametrize(("text", "chunk"), [("größer", b"tEXt"), ("größer 猫", b"iTXt")])
def test_png_chunks(text: str, chunk: bytes) -> None:
    data = saved("PNG", **save_parameters("PNG", {PARAMETERS: text})).getvalue()
    assert data.count(chunk + b"parameters\0") == 1
    assert read(io.BytesIO(data)).texts == {PARAMETERS: text}


def test_half_a_surrogate_pair_is_written_all_the_same() -> None:
    for kind in ("PNG", "JPEG"):
        assert read(saved(kind, **save_parameters(kind, {PARAMETERS: "a\ud83d"}))).texts[PARAMETERS] == "a?"


def test_what_other_programs_read_in_a_jpeg() -> None:
    exif = Image.open(saved("JPEG", **save_parameters("JPEG", OURS))).getexif()
    assert exif[containers.SOFTWARE].startswith("Reverie ")
    comment = exif.get_ifd(containers.EXIF_IFD)[containers.USER_COMMENT]
    assert comment == b"UNICODE\0" + OURS[PARAMETERS].encode("utf-16-be")


@pytest.mark.parametrize(
    ("length", "kept", "lost"),
    [(10_000, {PARAMETERS, OWN}, None), (40_000, {OWN}, "parameters"), (70_000, set(), "parameters and reverie")],
)
def test_a_jpeg_holds_only_so_much(length: int, kept: set[str], lost: str | None) -> None:
    texts = {PARAMETERS: "a" * length, OWN: "b" * length}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        options = save_parameters("JPEG", texts)
    assert [str(warning.message).partition(" not written")[0] for warning in said] == ([lost] if lost else [])
    assert read(saved("JPEG", **options)).texts.keys() - {"Software"} == kept
    assert read(saved("WEBP", **save_parameters("WEBP", texts))).texts[PARAMETERS] == texts[PARAMETERS]


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "größer".encode("utf-16-be"), b"UNICODE\0" + "größer".encode("utf-16-le"),
        b"UNICODE\0\xfe\xff" + "größer".encode("utf-16-be"), b"UNICODE\0\xff\xfe" + "größer".encode("utf-16-le"),
        b"ASCII\0\0\0" + "größer".encode(), b"\0" * 8 + "größer".encode() + b"\0", "größer".encode(),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inner", [True, False])
def test_user_comments_of_all_programs(comment: bytes, inner: bool) -> None:
    exif = Image.Exif()
    (exif.get_ifd(containers.EXIF_IFD) if inner else exif)[containers.USER_COMMENT] = comment
    assert read(saved("WEBP", exif=exif)).texts[PARAMETERS] == "größer"


def test_a_comment_without_an_encoding() -> None:
    exif = Image.Exif()
    exif[containers.USER_COMMENT] = "a cat"  # as Fooocus does it, of type ASCII
    assert read(saved("JPEG", exif=exif)).texts[PARAMETERS] == "a cat"


def test_exif_goes_before_a_chunk() -> None:
    exif = Image.Exif()
    exif[containers.USER_COMMENT] = b"ASCII\0\0\0from EXIF"
    info = PngInfo()
    info.add_text(PARAMETERS, "from the chunk")
    assert read(saved("PNG", exif=exif, pnginfo=info)).texts[PARAMETERS] == "from EXIF"


def test_graphs_of_comfyui_in_webp() -> None:
    exif = Image.Exif()
    exif[containers.MODEL], exif[containers.MAKE] = 'prompt:{"1": {}}', 'Workflow:{"nodes": []}'
    texts = read(saved("WEBP", exif=exif)).texts
    assert (texts["prompt"], texts["workflow"]) == ('{"1": {}}', '{"nodes": []}')
    exif[containers.MODEL], exif[containers.MAKE] = '{"sui_image_params": {}}', "Canon"
    assert read(saved("WEBP", exif=exif)).texts == {PARAMETERS: '{"sui_image_params": {}}'}


def test_a_camera_says_nothing() -> None:
    exif = Image.Exif()
    exif[containers.MAKE], exif[containers.MODEL], exif[containers.SOFTWARE] = "Canon", "EOS: 5", "Firmware 1.0"
    exif.get_ifd(containers.EXIF_IFD)[containers.MAKER_NOTE] = b"Canon\0\1\2"
    assert read(saved("JPEG", exif=exif)).texts == {"Software": "Firmware 1.0"}


def test_xmp() -> None:
    for kind in ("JPEG", "WEBP"):
        assert read(saved(kind, xmp=b"<x:xmpmeta/>")).texts["xmp"] == "<x:xmpmeta/>"
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>")
    assert read(saved("PNG", pnginfo=info)).texts["xmp"] == "<x:xmpmeta/>"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes, *, at_the_end: bool = False) -> io.BytesIO:
    """A PNG with one more chunk behind the header, or behind the pixels."""
    png = saved("PNG").getvalue()
    at = len(png) - 12 if at_the_end else 33
    return io.BytesIO(png[:at] + chunk(kind, data) + png[at:])


def test_chunks_behind_the_pixels() -> None:
    assert read(with_chunk(b"tEXt", b"parameters\0a cat", at_the_end=True)).texts == {PARAMETERS: "a cat"}


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
@pytest.mark.parametrize("at_the_end", [True, False])
def test_decompression_bombs(kind: bytes, at_the_end: bool) -> None:
    bomb = zlib.compress(b"a" * 50_000_000, 9)
    data = b"parameters\0" + (b"\0" if kind == b"zTXt" else b"\1\0\0\0") + bomb
    with pytest.raises(RequestError, match="too large") as caught:
        read(with_chunk(kind, data, at_the_end=at_the_end))
    assert "\n" not in str(caught.value)


def test_ten_megabytes() -> None:
    with pytest.raises(RequestError, match=f"10,000,000 characters of metadata; at most {MOST_TEXT:,} are read"):
        read(with_chunk(b"tEXt", b"parameters\0" + b"a" * 10_000_000))


def test_too_many_pixels() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(RequestError, match="exceeds limit"):
        read(io.BytesIO(bomb))


def test_places_where_there_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture", encoding="utf-8")
    for name, said in (("text.png", "is not a picture that can be read"), ("none.png", "no such picture")):
        with pytest.raises(RequestError, match=said) as caught:
            read(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(RequestError, match="is not a file"):
        read(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in the file system")
@pytest.mark.timeout(20)
def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(RequestError, match="is not a file"):
        read(tmp_path / "pipe.png")


WHOLE = {kind: saved(kind, **save_parameters(kind, OURS)).getvalue() for kind in ("PNG", "GIF", *EXIF)}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_damaged_pictures_give_one_line(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    try:
        assert isinstance(read(io.BytesIO(bytes(damaged[:cut]))), Carried)
    except RequestError as error:
        assert "\n" not in str(error)


def test_hidden_text_is_found(tmp_path: Path) -> None:
    from tests.engine.metadata.test_stealth import hide

    hide(samples.A1111.encode(), "pngcomp").save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").texts == {"stealth": samples.A1111}
