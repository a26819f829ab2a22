"""Draw a picture, then draw half of it anew; the other half stays as it was, bit for bit."""

import sys
from pathlib import Path

from PIL import Image

import reverie


def main(out: Path) -> None:
    model = reverie.load()
    apple = model.generate("a red apple", seed=7, steps=12).images[0]
    mask = Image.new("L", apple.size, 0)  # white is drawn, black is kept
    mask.paste(255, (apple.width // 2, 0, *apple.size))
    result = model.generate("a sun", image=apple, mask=mask, mask_blur=8, seed=3, steps=12)
    result.images[0].save(out)
    kept = (0, 0, apple.width // 2, apple.height)
    print(out, "left half unchanged:", result.images[0].crop(kept).tobytes() == apple.crop(kept).tobytes())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "half.png"))
