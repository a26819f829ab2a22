"""What the bundled adapters do: a sheet, and how well edges are followed. `python -m recipes.emoji.adapters`."""

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

import reverie
from reverie.control.registry import load_all
from reverie.engine.bundle import Model
from reverie.engine.grid import captioned
from reverie.engine.image import save_image
from reverie.engine.sources import data_url
from reverie.train.config import ControlRun, read_config
from reverie.train.data import as_images, examples

HELD_BACK = 1_000  # seed of pictures that no training run has seen
SHOWN = 6
NEAR = 1  # pixels that an edge may be off


def main() -> None:
    """Draw with and without the ControlNet and the LoRA, count the edges, and write a sheet."""
    parser = argparse.ArgumentParser(description="Draw the sheet of the bundled adapters.")
    parser.add_argument("--config", type=Path, default=Path("recipes/emoji/control.toml"))
    parser.add_argument("--count", type=int, default=48, help="pictures that edges are counted in")
    parser.add_argument("--out", type=Path, default=Path("docs/features/adapters.png"))
    given = parser.parse_args()
    model = reverie.load()
    data = examples(read_config(ControlRun, given.config).data, HELD_BACK)
    pixels, captions = data.batch(0, given.count)
    edges = [Image.fromarray(load_all()["canny"].run(np.asarray(picture))) for picture in as_images(pixels)]
    rows: dict[str, list[Image.Image]] = {"edges": edges[:SHOWN]}
    for name, controlled, loras in (
        ("prompt alone", False, ()), ("edges", True, ()),
        ("LoRA", False, ("cyanotype",)), ("both", True, ("cyanotype",)),
    ):  # fmt: skip
        count = given.count if not loras else SHOWN
        drawn = [drawing(model, captions[i], edges[i] if controlled else None, loras) for i in range(count)]
        scores = [agreement(edges[i], picture) for i, picture in enumerate(drawn)]
        print(f"{name}: F1 of edges {np.mean(scores):.3f} over {count} pictures")
        rows["with the edges" if name == "edges" else name] = drawn[:SHOWN]
    labels = [captions[i] if name == "prompt alone" else name for name in rows for i in range(SHOWN)]
    sheet = [picture.resize((128, 128), Image.Resampling.NEAREST) for row in rows.values() for picture in row]
    save_image(captioned(sheet, labels, SHOWN), given.out)


def drawing(model: Model, prompt: str, edges: Image.Image | None, loras: tuple[str, ...]) -> Image.Image:
    """One picture of 64x64, of a seed that is the same for all."""
    control = {"kind": "canny", "picture": data_url(edges), "preprocessor": "none"} if edges else None
    fields: dict[str, Any] = {"controls": [control]} if control else {}
    return model.generate(prompt, seed=HELD_BACK, upscaler="none", loras=loras, **fields).images[0]


def agreement(edges: Image.Image, picture: Image.Image) -> float:
    """F1 of a picture's own edges against those it was to follow, each allowed to be a pixel off."""
    wanted = np.asarray(edges.convert("L")) > 0
    found = np.asarray(Image.fromarray(load_all()["canny"].run(np.asarray(picture))).convert("L")) > 0
    if not wanted.any() or not found.any():
        return float(wanted.any() == found.any())
    around = np.ones((2 * NEAR + 1,) * 2, np.uint8)
    precision = cv2.dilate(wanted.astype(np.uint8), around)[found].mean()
    recall = cv2.dilate(found.astype(np.uint8), around)[wanted].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


if __name__ == "__main__":
    main()
