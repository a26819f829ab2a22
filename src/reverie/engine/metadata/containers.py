"""Where pictures keep text: PNG chunks, EXIF, XMP, GIF comments. Both ways, with Pillow."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from reverie import __version__
from reverie.engine.metadata import stealth
from reverie.errors import RequestError

OWN = "reverie"  # our own JSON
PARAMETERS = "parameters"  # AUTOMATIC1111's text
MOST_TEXT = 2**22  # characters of metadata in one picture
MOST_EXIF = 65_533  # bytes in a segment of a JPEG
EXIF_IFD, DESCRIPTION, MAKE, MODEL, SOFTWARE = 0x8769, 0x010E, 0x010F, 0x0110, 0x0131
USER_COMMENT, MAKER_NOTE = 0x9286, 0x927C
UNICODE, ASCII, UNDEFINED = b"UNICODE\0", b"ASCII\0\0\0", b"\0" * 8  # how a user comment says its encoding
OWN_NOTE = b"reverie\0"  # before our JSON in the maker note
TELLING = {OWN, PARAMETERS, "prompt", "workflow", "invokeai_metadata", "sd-metadata", "Dream", "Prompt"}


@dataclass(frozen=True)
class Carried:
    """The texts of a picture by their PNG keywords; EXIF under the keywords that hold the same in a PNG.

    Attributes:
        texts: keyword -> text.
        size: width and height.
    """

    texts: dict[str, str]
    size: tuple[int, int]


def read(source: Path | IO[bytes]) -> Carried:
    """Every text of a picture.

    Raises:
        RequestError: not there, not a picture, broken, or with more text than anyone writes.
    """
    what = str(source) if isinstance(source, Path) else "the picture"
    if isinstance(source, Path) and source.exists() and not source.is_file():  # a pipe would hang when opened
        raise RequestError(f"{what} is not a file; expected a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures and of damaged EXIF
            with Image.open(source) as image:
                carried = Carried(_texts(image), image.size)
    except FileNotFoundError:
        raise RequestError(f"no such picture: {what}") from None
    except UnidentifiedImageError:
        raise RequestError(f"{what} is not a picture that can be read") from None
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead them to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(f"{what} is not a picture that can be read: {reason}") from None
    length = sum(map(len, carried.texts.values()))
    if length > MOST_TEXT:
        raise RequestError(f"{what} has {length:,} characters of metadata; at most {MOST_TEXT:,} are read")
    return carried


def save_parameters(kind: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """What Pillow's `save` wants in order to write our texts into a file of the format `kind`.

    PNG: a tEXt chunk each, iTXt where the text is not Latin-1. JPEG, WebP, AVIF: EXIF, the parameters as user comment
    and our JSON as maker note. GIF: the parameters as comment. Nothing for other formats.
    """
    texts = {key: text.encode("utf-8", "replace").decode() for key, text in texts.items()}
    if not texts:
        return {}
    if kind == "PNG":
        chunks = PngInfo()
        for key, text in texts.items():
            chunks.add_text(key, text)
        return {"pnginfo": chunks}
    if kind in {"JPEG", "WEBP", "AVIF"}:
        return {"exif": _exif(texts, MOST_EXIF if kind == "JPEG" else None)}
    if kind == "GIF" and PARAMETERS in texts:
        return {"comment": texts[PARAMETERS].encode()}
    return {}


def _exif(texts: Mapping[str, str], most: int | None) -> bytes:
    """EXIF with our texts. Where it would not fit, the parameters go first: our JSON says more."""
    for left_out in ((), (PARAMETERS,), (PARAMETERS, OWN)):
        exif = Image.Exif()
        exif.endian = ">"  # as user comments in UTF-16 are read
        exif[SOFTWARE] = f"Reverie {__version__}"
        inner = exif.get_ifd(EXIF_IFD)
        if PARAMETERS in texts and PARAMETERS not in left_out:
            inner[USER_COMMENT] = UNICODE + texts[PARAMETERS].encode("utf-16-be")
        if OWN in texts and OWN not in left_out:
            inner[MAKER_NOTE] = OWN_NOTE + texts[OWN].encode()
        data = exif.tobytes()
        if most is None or len(data) <= most:
            break
    if left_out:
        warnings.warn(
            f"{' and '.join(left_out)} not written into the picture: a JPEG holds {most:,} bytes of metadata; use .png",
            stacklevel=2,
        )
    return data


def _texts(image: Image.Image) -> dict[str, str]:
    texts = _stored(image)
    if not _tells(texts) and image.format == "PNG":
        image.load()  # text may stand behind the pixels
        texts |= _stored(image)
    if not _tells(texts) and image.format in {"PNG", "WEBP"}:
        hidden = stealth.read(image)
        if hidden is not None:
            texts["stealth"] = hidden
    return texts


def _tells(texts: Mapping[str, str]) -> bool:
    return bool(texts.keys() & TELLING) or texts.get("Comment", "").startswith("{")


def _stored(image: Image.Image) -> dict[str, str]:
    """Text chunks and comments, EXIF above them: where both are there A1111 takes EXIF."""
    texts = {}
    for key, value in image.info.items():
        if isinstance(value, str):
            texts["xmp" if key == "XML:com.adobe.xmp" else str(key)] = str(value)
    if isinstance(xmp := image.info.get("xmp"), bytes):
        texts["xmp"] = xmp.decode("utf-8", "replace")
    if isinstance(comment := image.info.get("comment"), bytes):  # GIF and JPEG
        texts["comment"] = comment.decode("utf-8", "replace")
    return texts | dict(_from_exif(image.getexif()))


def _from_exif(exif: Image.Exif) -> Iterator[tuple[str, str]]:
    inner = {**exif, **exif.get_ifd(EXIF_IFD)}
    for tag, key in {SOFTWARE: "Software", DESCRIPTION: "Description"}.items():
        if text := _ascii(inner.get(tag)):
            yield key, text
    for tag in (MODEL, MAKE):  # ComfyUI: `prompt:{...}` and `workflow:{...}`; SwarmUI: `{...}`
        key, colon, text = _ascii(inner.get(tag)).partition(":")
        if colon and key.lower() in {"prompt", "workflow"}:
            yield key.lower(), text
        elif key.startswith("{"):
            yield PARAMETERS, key + colon + text
    comment = _user_comment(inner.get(USER_COMMENT))
    if comment:
        yield PARAMETERS, comment
    note = inner.get(MAKER_NOTE)
    if isinstance(note, bytes) and note.startswith(OWN_NOTE):
        yield OWN, note.removeprefix(OWN_NOTE).decode("utf-8", "replace")


def _ascii(value: object) -> str:
    """A tag that should be ASCII: Pillow takes it for Latin-1, programs write UTF-8."""
    if not isinstance(value, str):
        return ""
    with suppress(UnicodeError):
        value = value.encode("latin-1").decode()
    return value.strip("\0")


def _user_comment(value: object) -> str:
    """A user comment in any of the encodings that programs write."""
    if not isinstance(value, bytes):
        return _ascii(value)
    head, body = value[:8], value[8:]
    if head == UNICODE:
        return body.decode(_utf_16(body), "replace").strip("\0\ufeff")
    return (body if head in {ASCII, UNDEFINED} else value).decode("utf-8", "replace").strip("\0")


def _utf_16(data: bytes) -> str:
    """The byte order: as its mark says, else the one that puts the zeros of Latin letters in front."""
    if data[:2] in {b"\xfe\xff", b"\xff\xfe"}:
        return "utf-16-be" if data[0] == 0xFE else "utf-16-le"
    return "utf-16-be" if data[::2].count(0) >= data[1::2].count(0) else "utf-16-le"
