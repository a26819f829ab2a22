"""Draw the contact sheet of a model: `python recipes/emoji/sheet.py --out docs/emoji-sheet.png`."""

import argparse
from pathlib import Path

import reverie
from reverie.engine.grid import captioned
from reverie.engine.image import save_image

PROMPTS = (
    "a red apple", "a blue fox, flat style", "three red apples", "a cat", "two yellow ducks", "a 3d penguin",
    "a purple octopus left of a house, 3d style", "a smiling face with sunglasses", "a rocket on a black background",
    "a green elephant, cartoon style", "a robot above a bus", "a pink car on a blue background", "a sunflower",
    "a castle, 3d style", "four bananas", "an owl", "a birthday cake", "a christmas tree",
    "a butterfly on a green background", "a cactus, cartoon", "a puppy", "a guitar", "a star right of a cloud",
    "a snowman",
)  # fmt: skip


def main() -> None:
    """Draw every prompt once, with one seed, nothing picked."""
    parser = argparse.ArgumentParser(description="Draw the contact sheet of a model.")
    parser.add_argument("--model", help="file or folder; the bundled model if absent")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/emoji-sheet.png"))
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    given = parser.parse_args()
    model = reverie.load(given.model)
    pictures = [model.generate(prompt, seed=given.seed).images[0] for prompt in given.prompts]
    save_image(captioned(pictures, list(given.prompts)), given.out)
    print(f"{given.out}: {len(pictures)} pictures, seed {given.seed}")


if __name__ == "__main__":
    main()
