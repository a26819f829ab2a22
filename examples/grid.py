"""Every combination of steps and guidance scale on one labelled sheet."""

import sys
from pathlib import Path

import reverie
from reverie.engine.grid import Axis, cells, sheet


def main(out: Path) -> None:
    model = reverie.load()
    axes = [Axis.parse("steps=3,6,12"), Axis.parse("guidance_scale=1,4")]
    base = {"prompt": "a sun", "seed": 7, "upscaler": "none"}
    pictures = {cell.place: model.draw(cell.request).images[0] for cell in cells(base, axes)}
    sheet(pictures, axes).save(out)
    print(out, len(pictures), "pictures")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "grid.png"))
