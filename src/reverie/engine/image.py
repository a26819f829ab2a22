"""Pictures as files: rounding, saving them whole or not at all with what made them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from reverie.checkpoint.quantising import PACKINGS
from reverie.checkpoint.save import write_atomically
from reverie.engine.bundle import Model, bundled_path
from reverie.engine.hashes import hash_paths
from reverie.engine.metadata import a1111, own
from reverie.engine.metadata.containers import OWN, PARAMETERS, save_parameters
from reverie.engine.request import Request
from reverie.errors import RequestError

BUNDLED_SOURCE = "bundled"  # instead of a path: the package is elsewhere on every machine


def to_images(pixels: Tensor, requests: Sequence[Request], model: Mapping[str, str]) -> list[Image.Image]:
    """Pictures that say what made them: saved as PNG, JPEG, WebP, AVIF or GIF they carry it.

    Args:
        pixels: `(N, H, W, 3)` in [0, 1].
        requests: for each picture the resolved request that draws it alone.
        model: name, source, family and hash of the model.
    """
    rounded = (pixels * 255).round().clamp(0, 255).byte().numpy()
    images: list[Image.Image] = []
    for array, request in zip(rounded, requests, strict=True):
        image, hashes = _as_picture(Image.fromarray(array)), _picture_hashes(request)
        image.info[PARAMETERS] = a1111.write(request, model, hashes)
        image.info[OWN] = own.write(request, model, hashes)
        images.append(image)
    return images


class Picture(Image.Image):
    """A PIL picture whose `save` writes what made it, without being asked."""

    def save(self, fp: Any, format: str | None = None, *, metadata: bool = True, **params: Any) -> None:  # noqa: A002
        """As `PIL.Image.Image.save`; PNG, JPEG, WebP, AVIF and GIF files get the texts in `info`.

        Args:
            fp: a path or an open file.
            format: the format's name in PIL; from the ending if absent.
            metadata: whether to write them.
            params: as in PIL; `pnginfo`, `exif` and `comment` go before ours.
        """
        texts = {key: self.info[key] for key in (PARAMETERS, OWN) if key in self.info} if metadata else {}
        super().save(fp, format, **(save_parameters(_format(fp, format), texts) | params))

    def copy(self) -> "Picture":
        """The same picture, which still says what made it; a changed one (resized, converted) does not."""
        return _as_picture(super().copy())


def _as_picture(image: Image.Image) -> Picture:
    image.__class__ = Picture
    assert isinstance(image, Picture)
    return image


def _format(fp: Any, name: str | None) -> str:
    """The format's name in PIL; empty if it cannot be told, which PIL reports itself."""
    return (name or _kind(Path(str(getattr(fp, "name", fp)))) or "").upper()


def _kind(path: Path) -> str | None:
    """The format in PIL of an ending. The common ones first: asking for all makes PIL import some 45 modules."""
    Image.preinit()
    ending = path.suffix.lower()
    return Image.EXTENSION.get(ending) or Image.registered_extensions().get(ending)


def save_image(image: Image.Image, path: Path, *, metadata: bool = True) -> None:
    """Write a picture; the ending decides the format.

    Args:
        image: to be written; one of `to_images` says what made it.
        path: where to.
        metadata: whether it says so in the file.

    Raises:
        RequestError: an ending that no picture format has.
        OutputError: the place cannot be written; nothing half-written is left.
    """
    kind = picture_format(path)
    told = {} if metadata or not isinstance(image, Picture) else {"metadata": False}
    write_atomically(path, lambda temporary: image.save(temporary, kind, **told))


def picture_format(path: Path) -> str:
    """The name in PIL of the format that the ending of `path` means.

    Raises:
        RequestError: an ending that no picture format has.
    """
    kind = _kind(path)
    if kind is None or kind not in Image.SAVE:
        raise RequestError(f"{path} has no picture ending that can be written; use .png, .jpg or .webp")
    return kind


def fingerprint(model: Model) -> dict[str, str]:
    """Name, source and SHA-256 of a model, for metadata; and what makes its numbers others than in float32: the
    precision that it computes in, and how its weights are quantised.
    """
    files = sorted({path for paths in model.parts.identity.files.values() for path in paths})
    name = model.source.stem if model.source.is_file() else model.source.name
    source = BUNDLED_SOURCE if model.source == bundled_path() else str(model.source)
    told = {"name": name, "source": source, "family": model.parts.identity.family, "hash": hash_paths(files)}
    told |= {"weights": model.weights} if model.weights in PACKINGS else {}
    precision = str(model.dtype).removeprefix("torch.")
    return told | ({} if precision == "float32" else {"precision": precision})


def _picture_hashes(request: Request) -> dict[str, str]:
    """SHA-256 of the pictures that a request begins with, by field; of those that are still there."""
    found = {}
    for name in ("image", "mask", "depth"):
        value = getattr(request, name)
        if value is None:
            continue
        if value.startswith("data:"):
            found[name] = own.picture_hash(value)
        elif Path(value).expanduser().is_file():
            found[name] = hash_paths([Path(value).expanduser()])
    return found
