"""Draw the contact sheet of a model: `python recipes/emoji/sheet.py --out docs/emoji-sheet.png`."""

import argparse
from pathlib import Path

import reverie
from reverie.engine.grid import captioned
from reverie.engine.image import save_image

PROMPTS = (
    "a red apple", "a smiling sun", "a cat face", "a rocket", "a green frog", "an elephant",
    "a slice of watermelon", "a birthday cake", "a blue car", "a sailboat", "an owl", "a red heart",
    "a smiling face with sunglasses", "a robot", "a ghost", "a snowman", "a bicycle", "a guitar",
    "a christmas tree", "a butterfly", "a hamburger", "a crown", "a house with a garden", "a panda",
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
