"""Draw a sheet of composed scenes with their captions: `python -m recipes.emoji.scene_sheet --data data/sprites`."""

import argparse
from pathlib import Path

from PIL import Image

from reverie.engine.grid import captioned
from reverie.engine.image import save_image
from reverie.train.scenes import SPLITS, Scenes, ScenesConfig

GROUND = "#e8e8ec"  # so that the edges of white pictures are seen


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
    pictures = [Image.fromarray(pixels) for pixels in scenes.draw(chosen)]
    save_image(captioned(pictures, [scene.caption for scene in chosen], given.columns, GROUND), given.out)
    print(f"{given.out}: {count} scenes, seed {given.seed}")


if __name__ == "__main__":
    main()
