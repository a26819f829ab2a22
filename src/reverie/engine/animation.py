"""Frames as one moving picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from reverie.checkpoint.save import write_atomically
from reverie.engine.metadata.containers import OWN, PARAMETERS, save_parameters
from reverie.errors import RequestError

FORMATS = {".gif": "GIF", ".webp": "WEBP", ".apng": "PNG"}
MILLISECONDS = 80  # a frame
TURNS = 6  # frames that the ends stand still


def save_animation(frames: Sequence[Image.Image], path: Path, *, metadata: bool = True) -> None:
    """Frames there and back again, without end; GIF, WebP or APNG by the ending of `path`.

    What made the first frame is written into it.

    Raises:
        RequestError: another ending.
        OutputError: the place cannot be written.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise RequestError(f"{path} cannot hold a moving picture; use {', '.join(FORMATS)}")
    around = [*frames, *frames[-2:0:-1]]
    times = [MILLISECONDS] * len(around)
    times[0] = times[len(frames) - 1] = MILLISECONDS * TURNS
    plain = [Image.frombytes("RGB", frame.size, frame.convert("RGB").tobytes()) for frame in around]
    told = {key: frames[0].info[key] for key in (PARAMETERS, OWN) if metadata and key in frames[0].info}
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    options |= save_parameters(kind, told) if told else {}
    write_atomically(
        path,
        lambda p: plain[0].save(p, kind, save_all=True, append_images=plain[1:], duration=times, loop=0, **options),
    )
