"""Drawings cut out, scaled and brought to one form: square RGBA pixels, transparent around the thing."""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from recipes.emoji.packages import BuildError, read_members
from recipes.emoji.styles import code_key

Pixels = npt.NDArray[np.uint8]
# Drawings are rendered at this width; the 3D pictures have it too.
RENDERED = 256
# Less opaque pixels (soft shadows, rendering noise) do not count as part of the drawing: of 255.
FAINT = 16


def cut_out(image: Image.Image, size: int) -> Pixels | None:
    """Crop an RGBA drawing to what it shows and fit that, centred, into size x size; None if it shows nothing."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point([0] * FAINT + [255] * (256 - FAINT)).getbbox()
    if box is None:
        return None
    width, height = box[2] - box[0], box[3] - box[1]
    scale = size / max(width, height)
    fitted = max(1, round(width * scale)), max(1, round(height * scale))
    # Premultiplied, so that the colour of invisible pixels does not bleed into the edges.
    drawing = image.convert("RGBa").resize(fitted, Image.Resampling.LANCZOS, box=box).convert("RGBA")
    canvas = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    canvas.paste(drawing, ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
    return np.asarray(canvas, dtype=np.uint8)


def svg_document(icon_set: Mapping[str, Any], icon: Mapping[str, Any]) -> str:
    """A whole SVG file from one body of an Iconify set."""
    left, top, width, height = (
        icon.get(key, icon_set.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def render_svg(document: str, width: int) -> Image.Image:
    """Draw an SVG at a given width, with a transparent background."""
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise BuildError("resvg_py is not installed; run: pip install resvg-py==0.5.0") from error
    png = resvg_py.svg_to_bytes(svg_string=document, width=width, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png)))


def draw_svg_set(
    icon_set: Mapping[str, Any], icons: Mapping[str, str], keys: Collection[str], size: int
) -> dict[str, Pixels]:
    """Draw every wanted icon of a set; `icons` says which icon shows which emoji."""
    sprites = {}
    for number, key in enumerate(keys):
        if key in icons:
            document = svg_document(icon_set, icon_set["icons"][icons[key]])
            sprite = cut_out(render_svg(document, RENDERED), size)
            if sprite is not None:
                sprites[key] = sprite
        progress(icon_set["prefix"], number + 1, len(keys), last=number + 1 == len(keys))
    return sprites


def draw_webp_set(archive: Path, keys: Collection[str], size: int) -> dict[str, Pixels]:
    """Fit the ready-made 3D pictures, whose files are named by code points."""
    sprites = {}
    wanted = frozenset(keys)
    for name, data in read_members(archive, lambda name: code_key(Path(name).stem) in wanted):
        if not name.endswith(".webp"):
            continue
        sprite = cut_out(Image.open(io.BytesIO(data)), size)
        if sprite is not None:
            sprites[code_key(Path(name).stem)] = sprite
        progress("fluent-emoji-3d", len(sprites), len(wanted), last=False)
    progress("fluent-emoji-3d", len(sprites), len(wanted), last=True)
    return sprites


def progress(what: str, done: int, total: int, *, last: bool) -> None:
    """One line that counts up on a terminal; elsewhere only its end."""
    if last or (sys.stderr.isatty() and done % 20 == 0):
        print(f"\rdrawing {what}: {done}/{total}", end="\n" if last else "", file=sys.stderr, flush=True)
