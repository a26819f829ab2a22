"""Draw the contact sheet of a model: `python recipes/emoji/sheet.py --out docs/emoji-sheet.png`."""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import reverie
from reverie.engine.image import save_image

PROMPTS = (
    "a red apple", "a smiling sun", "a cat face", "a rocket", "a green frog", "an elephant",
    "a slice of watermelon", "a birthday cake", "a blue car", "a sailboat", "an owl", "a red heart",
    "a smiling face with sunglasses", "a robot", "a ghost", "a snowman", "a bicycle", "a guitar",
    "a christmas tree", "a butterfly", "a hamburger", "a crown", "a house with a garden", "a panda",
)  # fmt: skip
COLUMNS, MARGIN, LABEL = 6, 16, 28


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
    save_image(sheet(pictures, list(given.prompts)), given.out)
    print(f"{given.out}: {len(pictures)} pictures, seed {given.seed}")


def sheet(pictures: list[Image.Image], labels: list[str]) -> Image.Image:
    """The pictures in rows, each over its prompt."""
    size = pictures[0].width
    rows = -(-len(pictures) // COLUMNS)
    cell = (size + MARGIN, size + LABEL + MARGIN)
    page = Image.new("RGB", (COLUMNS * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(16)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = MARGIN + i % COLUMNS * cell[0], MARGIN + i // COLUMNS * cell[1]
        page.paste(picture, (x, y))
        draw.text((x + size / 2, y + size + 4), label, fill="black", font=font, anchor="ma")
    return page


if __name__ == "__main__":
    main()
