"""Draw a sheet of composed scenes with their captions: `python -m recipes.emoji.scene_sheet --data data/sprites`."""

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from reverie.engine.image import save_image
from reverie.train.scenes import SPLITS, Scene, Scenes, ScenesConfig

MARGIN, LINE, LINES, FONT = 10, 13, 5, 11


def main() -> None:
    """Draw the first scenes of a seed, nothing picked."""
    parser = argparse.ArgumentParser(description="Draw composed scenes with their captions.")
    parser.add_argument("--data", type=Path, required=True, help="folder that build.py made")
    parser.add_argument("--out", type=Path, default=Path("docs/features/scenes.png"))
    parser.add_argument("--concepts", type=int, help="only this many of the best known things")
    parser.add_argument("--styles", nargs="*", default=[], help="only these styles")
    parser.add_argument("--split", choices=SPLITS, help="scenes that are held out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    given = parser.parse_args()
    config = ScenesConfig(path=given.data, size=given.size, concepts=given.concepts, styles=given.styles)
    scenes = Scenes(config, given.seed)
    count = given.rows * given.columns
    chosen = scenes.held_out(given.split, count, given.seed) if given.split else [scenes.scene(n) for n in range(count)]
    save_image(sheet(scenes, chosen, given.columns), given.out)
    print(f"{given.out}: {count} scenes, seed {given.seed}")


def sheet(scenes: Scenes, chosen: list[Scene], columns: int) -> Image.Image:
    """The pictures in rows, each over its caption."""
    size = scenes.config.size
    font = ImageFont.load_default(FONT)
    cell = (size + MARGIN, size + LINES * LINE + MARGIN)
    page = Image.new("RGB", (columns * cell[0] + MARGIN, -(-len(chosen) // columns) * cell[1] + MARGIN), "#e8e8ec")
    draw = ImageDraw.Draw(page)
    for number, (scene, pixels) in enumerate(zip(chosen, scenes.draw(chosen), strict=True)):
        x, y = MARGIN + number % columns * cell[0], MARGIN + number // columns * cell[1]
        page.paste(Image.fromarray(pixels), (x, y))
        lines = textwrap.wrap(scene.caption, size * 2 // FONT - 1)[:LINES]
        draw.text((x, y + size + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return page


if __name__ == "__main__":
    main()
