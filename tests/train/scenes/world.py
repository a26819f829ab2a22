"""A small folder of sprites, drawn here: discs, squares and rings in seven styles."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from reverie.train.scenes.colours import Bytes, describe, named
from reverie.train.scenes.sprites import FORMAT

SIZE = 32
STYLES = ("3d", "flat", "cartoon", "blob", "shaded", "retro", "silhouette")
INK = "silhouette"
# name -> colour of its drawings, plural, synonyms, whether its name leaves room for a colour
THINGS: dict[str, tuple[str, str | None, tuple[str, ...], bool]] = {
    "red apple": ("red", "red apples", ("apple",), False),
    "fox": ("orange", "foxes", ("vixen", "reynard", "red fox"), True),
    "unicorn": ("pink", "unicorns", ("horned horse",), True),
    "mouse": ("gray", "mice", ("rodent", "murine"), True),
    "hourglass": ("brown", "hourglasses", ("sand clock", "sand glass"), True),
    "bread": ("brown", None, ("loaf of bread",), True),
    "owl": ("brown", "owls", ("night bird",), True),
    "cloud": ("white", "clouds", ("cumulus", "nimbus"), True),
    "frog": ("green", "frogs", ("toad", "pond frog"), True),
    "star": ("yellow", "stars", ("sun far away",), True),
    "whale": ("blue", "whales", ("sea giant", "leviathan"), True),
    "plum": ("purple", "plums", ("damson", "prune"), True),
}
LEFT_OUT = ("plum", "retro"), ("plum", "blob")  # drawn in five styles only


def drawing(number: int, style: str, colour: str) -> Bytes:
    """A disc, square or ring with a black dot; the shade depends on the style."""
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) * 2 - 1
    shapes = (x**2 + y**2 <= 1, np.maximum(abs(x), abs(y)) <= 0.9, (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3))
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    shade = 1 - 0.03 * STYLES.index(style)
    rgba[shapes[number % 3]] = (*(int(c * shade) for c in named("black" if style == INK else colour)), 255)
    rgba[4:6, 4:6, :3] = 0
    return rgba


def write_world(folder: Path) -> Path:
    """Write the folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels: list[tuple[Bytes, bool]] = []
    concepts: list[dict[str, object]] = []
    for number, (name, (colour, plural, synonyms, plain)) in enumerate(THINGS.items()):
        rows = {}
        for style in STYLES:
            if (name, style) not in LEFT_OUT:
                rows[style] = len(pixels)
                pixels.append((drawing(number, style, colour), style == INK))
        words = [{"text": name, "article": "a" if plural else "", "plural": plural, "plain": plain}]
        words += [{"text": w, "article": "a", "plural": w + "s", "plain": "red" not in w} for w in synonyms]
        labels = {"de": f"{name} auf deutsch", "fr": f"{name} en français"}
        concept = {"name": name, "group": "things", "words": words, "labels": labels, "rows": rows}
        concepts.append({**concept, "natural": [colour, "black"]})
    index = {
        "format": FORMAT,
        "styles": [{"name": style, "ink": style == INK, "adjective": style != INK} for style in STYLES],
        "concepts": concepts,
        "sprites": [asdict(describe(rgba, ink)) for rgba, ink in pixels],
    }
    np.save(folder / "sprites.npy", np.stack([rgba for rgba, _ in pixels]))
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
