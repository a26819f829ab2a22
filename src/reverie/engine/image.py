"""Pictures as files: rounding, what a PNG carries about its making, reading it back, saving whole or not at all."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from reverie import __version__
from reverie.checkpoint.save import write_atomically
from reverie.engine.bundle import Model, bundled_path
from reverie.engine.request import Request
from reverie.errors import RequestError

KEY = "reverie"  # PNG text chunk of our own JSON
BUNDLED_SOURCE = "bundled"  # instead of a path: the package is elsewhere on every machine
A1111_KEY = "parameters"  # PNG text chunk that AUTOMATIC1111 writes and the ecosystem reads
LABELS = {  # sampler names as AUTOMATIC1111 prints them
    "euler": "Euler", "euler_a": "Euler a", "heun": "Heun", "lms": "LMS", "dpmpp_2m": "DPM++ 2M",
    "ddim": "DDIM", "ddpm": "DDPM", "pndm": "PLMS",
}  # fmt: skip
SPACING_LABELS = {
    "karras": "Karras", "exponential": "Exponential", "linspace": "Uniform", "trailing": "Simple", "leading": "DDIM",
}  # fmt: skip


def to_images(pixels: Tensor, request: Request, model: dict[str, str]) -> list[Image.Image]:
    """`(N, H, W, 3)` in [0, 1] -> PIL pictures, each with its own request in `info`.

    Saving one as PNG with `save_image`, or with `image.save(path, pnginfo=image.info["pnginfo"])`, writes it down.
    """
    rounded = (pixels * 255).round().clamp(0, 255).byte().numpy()
    return [_with_text(rounded[i], request, i, model) for i in range(len(rounded))]


class Picture(Image.Image):
    """A PIL picture whose `save` writes what made it, without being asked."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:  # noqa: A002
        """As `PIL.Image.Image.save`; PNG files get the text chunks in `info`."""
        text = PngInfo()
        for key in (A1111_KEY, KEY):
            if key in self.info:
                text.add_text(key, self.info[key])
        params.setdefault("pnginfo", text)
        super().save(fp, format, **params)

    def copy(self) -> "Picture":
        """The same picture, which still says what made it; a changed one (resized, converted) does not."""
        return _as_picture(super().copy())


def _as_picture(image: Image.Image) -> Picture:
    image.__class__ = Picture
    assert isinstance(image, Picture)
    return image


def _with_text(
    array: "np.ndarray[Any, np.dtype[np.uint8]]", request: Request, i: int, model: dict[str, str]
) -> Image.Image:
    single = request.model_copy(update={"seed": (request.seed or 0) + i, "count": 1})
    image = _as_picture(Image.fromarray(array))
    image.info[A1111_KEY] = a1111_text(single, model)
    image.info[KEY] = json.dumps(
        {"version": __version__, "request": single.model_dump(exclude_none=True), "model": model},
        ensure_ascii=False,
    )
    return image


def a1111_text(request: Request, model: dict[str, str]) -> str:
    """The `parameters` text of AUTOMATIC1111's web UI."""
    sampler, spacing = request.sampler or "", request.spacing or ""
    entries: dict[str, object] = {
        "Steps": request.steps, "Sampler": LABELS.get(sampler, sampler),
        "Schedule type": SPACING_LABELS.get(spacing, spacing),
        "CFG scale": f"{request.guidance_scale:g}", "Seed": request.seed,
        "Size": f"{request.width}x{request.height}", "Model hash": model["hash"][:10], "Model": model["name"],
    }  # fmt: skip
    if request.clip_skip > 1:
        entries["Clip skip"] = request.clip_skip
    entries["RNG"] = "CPU"
    if request.eta is not None:
        entries["Eta"] = f"{request.eta:g}"
    if request.upscaler not in {None, "none"}:
        entries["Postprocess upscaler"] = request.upscaler
    entries["Version"] = f"Reverie {__version__}"
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    return f"{request.prompt}{negative}\n" + ", ".join(f"{k}: {_quoted(v)}" for k, v in entries.items())


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",:\n") else text


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture; the ending decides the format, `.png` carries the request.

    Raises:
        RequestError: an ending that no picture format has.
        OutputError: the place cannot be written; nothing half-written is left.
    """
    kind = picture_format(path)
    write_atomically(path, lambda temporary: image.save(temporary, kind))


def picture_format(path: Path) -> str:
    """The name in PIL of the format that the ending of `path` means.

    Raises:
        RequestError: an ending that no picture format has.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise RequestError(f"{path} has no picture ending that can be written; use .png, .jpg or .webp")
    return kind


def read_request(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The request and the model that made a picture of ours.

    Raises:
        RequestError: not a picture, or one that does not carry a request.
    """
    if path.exists() and not path.is_file():  # a pipe would hang when opened
        raise RequestError(f"{path} is not a file; --from takes a picture")
    try:
        with Image.open(path) as image:
            text = image.info.get(KEY)
    except FileNotFoundError:
        raise RequestError(f"no such picture: {path}") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path} is not a picture that can be read: {error}") from None
    try:
        data = json.loads(text or "")
        return dict(data["request"]), {str(key): str(value) for key, value in data["model"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RequestError(f"{path} does not carry a request of Reverie (PNG text chunk {KEY!r})") from None


def fingerprint(model: Model) -> dict[str, str]:
    """Name, source and SHA-256 of a model, for metadata."""
    files = sorted({path for paths in model.parts.identity.files.values() for path in paths})
    digest = hash_files(tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files))
    name = model.source.stem if model.source.is_file() else model.source.name
    source = BUNDLED_SOURCE if model.source == bundled_path() else str(model.source)
    return {"name": name, "source": source, "family": model.parts.identity.family, "hash": digest}


@cache
def hash_files(files: tuple[tuple[str, int, int], ...]) -> str:
    """SHA-256 of one file, or of the SHA-256s of several one after another; `files` are (path, size, mtime)."""
    digests = []
    for path, _, _ in files:
        with Path(path).open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(d.digest() for d in digests)).hexdigest()
