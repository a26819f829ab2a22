"""Ink drawings of what the bundled model knows, for its LoRA to learn from. `python -m recipes.emoji.ink`."""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from reverie.train.config import ControlRun, read_config
from reverie.train.data import as_images, examples

COUNT, SEED = 2048, 11


def main() -> None:
    """Compose scenes, turn them into ink drawings, and write a set as `reverie train lora` reads it."""
    parser = argparse.ArgumentParser(description="Make a set of ink drawings.")
    parser.add_argument("--config", type=Path, default=Path("recipes/emoji/control.toml"), help="whose [data] is drawn")
    parser.add_argument("--out", type=Path, default=Path("data/ink"))
    given = parser.parse_args()
    pixels, captions = examples(read_config(ControlRun, given.config).data, SEED).batch(0, COUNT)
    given.out.mkdir(parents=True, exist_ok=True)
    np.save(given.out / "pictures.npy", np.stack([inked(np.asarray(picture)) for picture in as_images(pixels)]))
    rows = (json.dumps({"captions": [caption]}) + "\n" for caption in captions)
    (given.out / "captions.jsonl").write_text("".join(rows), encoding="utf-8")
    print(f"{given.out}: {COUNT} pictures")


def inked(picture: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Grey wash in three tones, and dark lines where the colours change."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    wash = (np.round(grey / 255 * 3) / 3 * 120 + 135).astype(np.uint8)
    lines = cv2.Canny(picture, 60, 140) > 0
    drawn = np.where(lines, 25, np.where(grey > 245, 255, wash)).astype(np.uint8)
    return np.repeat(drawn[..., None], 3, axis=2)


if __name__ == "__main__":
    main()
