"""Scenes become pixels."""

import numpy as np
from PIL import Image

from reverie.train.scenes.colours import Bytes, named, painted, recolour
from reverie.train.scenes.scene import Place, Scene, Thing
from reverie.train.scenes.sprites import Sprites


def draw(scene: Scene, sprites: Sprites, size: int) -> Bytes:
    """Compose a scene.

    Args:
        size: width and height in pixels.

    Returns:
        (size, size, 3) uint8.
    """
    canvas = _background(scene.background, size)
    done: dict[tuple[int, int], Bytes] = {}
    for place in scene.places:
        thing = scene.things[place.thing]
        side = max(1, round(place.side * size))
        key = place.thing, side
        if key not in done:
            done[key] = _drawing(thing, sprites, side)
        _lay(done[key], place, canvas)
    return canvas


def _background(colours: tuple[str, ...], size: int) -> Bytes:
    """One colour, or two that run into each other from top to bottom."""
    ends = np.array([named(colours[0]), named(colours[-1])], np.float32)
    part = np.linspace(0, 1, size, dtype=np.float32)[:, None]
    column = (ends[0] * (1 - part) + ends[1] * part + 0.5).astype(np.uint8)
    return np.repeat(column[:, None], size, axis=1)


def _drawing(thing: Thing, sprites: Sprites, side: int) -> Bytes:
    """The sprite `(side, side, 4)` at its size and in its colour."""
    sprite = np.asarray(sprites.pixels_of(thing.concept, thing.style))
    scaled = Image.fromarray(sprite).resize((side, side), Image.Resampling.LANCZOS)
    rgba = np.asarray(scaled, dtype=np.uint8)
    if thing.colour is None:
        return rgba
    return painted(rgba, thing.colour) if sprites.styles[thing.style].ink else recolour(rgba, thing.colour)


def _lay(drawing: Bytes, place: Place, canvas: Bytes) -> None:
    """Put a drawing over what is there."""
    side, size = len(drawing), len(canvas)
    left = min(max(round(place.x * size - side / 2), 0), size - side)
    top = min(max(round(place.y * size - side / 2), 0), size - side)
    under = canvas[top : top + side, left : left + side]
    alpha = drawing[..., 3:].astype(np.float32) / 255
    under[:] = (drawing[..., :3] * alpha + under * (1 - alpha) + 0.5).astype(np.uint8)
