"""Draw a picture with the bundled model and save it; the PNG carries its request."""

import sys
from pathlib import Path

import reverie


def main(out: Path) -> None:
    model = reverie.load()
    result = model.generate("a red apple", seed=7, steps=20)
    result.images[0].save(out)
    print(out, result.request.sampler, tuple(result.pixels.shape))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "apple.png"))
