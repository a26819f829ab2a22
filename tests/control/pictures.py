"""Pictures for preprocessors, drawn here."""

import numpy as np

from reverie.control.pixels import Pixels


def scene(height: int = 72, width: int = 96) -> Pixels:
    """A bright square and a dark disc on a gradient, with a little noise."""
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([60 + columns, 80 + rows, np.full_like(rows, 120)], axis=2).astype(np.float64)
    picture[height // 8 : height // 2, width // 8 : width // 2] = (230, 220, 60)
    disc = (rows - 0.65 * height) ** 2 + (columns - 0.7 * width) ** 2 < (0.25 * height) ** 2
    picture[disc] = (30, 40, 70)
    picture += np.random.default_rng(0).normal(0, 2, picture.shape)
    clipped: Pixels = picture.clip(0, 255).astype(np.uint8)
    return clipped
