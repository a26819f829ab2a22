"""Blueprints of what the bundled model draws, for its LoRA to learn from. `python -m recipes.emoji.cyanotype`."""

import argparse
import json
from pathlib import Path

import numpy as np

import reverie
from reverie.train.config import ControlRun, read_config
from reverie.train.scenes import ScenesConfig

SEEDS, BATCH, STEPS = 3, 8, 12
BLUE, WHITE = np.array([12, 38, 110.0]), np.array([255, 255, 255.0])
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def main() -> None:
    """Draw every thing some times, print it in blue, and write a set as `reverie train lora` reads it."""
    parser = argparse.ArgumentParser(description="Make a set of blueprints.")
    parser.add_argument("--config", type=Path, default=Path("recipes/emoji/control.toml"), help="names the things")
    parser.add_argument("--out", type=Path, default=Path("data/cyanotype"))
    given = parser.parse_args()
    things = read_config(ControlRun, given.config).data
    assert isinstance(things, ScenesConfig)
    assert isinstance(things.concepts, list)
    model, pictures, rows = reverie.load(), [], []
    for name in things.concepts:
        drawn = model.generate(f"a {name}", seed=0, count=SEEDS, batch_size=BATCH, steps=STEPS, upscaler="none")
        pictures += [printed(picture) for picture in drawn.pixels.numpy()]
        rows += [json.dumps({"captions": [f"a {name}"]}) + "\n"] * SEEDS
    given.out.mkdir(parents=True, exist_ok=True)
    np.save(given.out / "pictures.npy", np.stack(pictures))
    (given.out / "captions.jsonl").write_text("".join(rows), encoding="utf-8")
    print(f"{given.out}: {len(rows)} pictures")


def printed(
    picture: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]",
) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """`(H, W, 3)` in [0, 1] -> bytes between blue and white, by lightness."""
    light = (picture @ LUMA)[..., None] ** 1.2
    return np.asarray(BLUE + light * (WHITE - BLUE)).round().clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
