"""Colours by name: what colour a drawing is, and the same drawing in another one.

All of it is done in OKLab (Björn Ottosson, "A perceptual color space for image processing", 2020), where lightness,
chroma and hue can be changed one without the other.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# The colours that things are painted in; ours, chosen so that each is called by its name at a glance.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "orange": (247, 137, 22),
    "yellow": (250, 212, 44),
    "green": (52, 168, 66),
    "blue": (40, 116, 226),
    "purple": (134, 66, 196),
    "pink": (248, 128, 186),
    "brown": (134, 82, 46),
}
NEUTRALS: dict[str, tuple[int, int, int]] = {"white": (255, 255, 255), "gray": (150, 150, 152), "black": (20, 20, 22)}
# Chroma below the first number is grey, above the second a colour; in between partly.
GREY, COLOURED = 0.03, 0.08
# Hues within the first angle of the main one belong to it, beyond the second they do not.
SAME_HUE, OTHER_HUE = np.radians(45), np.radians(75)
# Only if this share of what is coloured has one hue, other hues (a leaf, a tongue) keep theirs.
ONE_HUE = 0.7
# A drawing of which less than this share is coloured counts as grey.
PALE = 0.2
# How far the mean lightness moves towards that of the new colour: 0 leaves it, 1 makes light and dark drawings equal.
LIGHTNESS_SHIFT = 0.9
# A colour that covers this share of a drawing is one of the drawing's own colours.
OWN_SHARE = 0.25
# One that covers this share, more than any other but black, white and grey, is the colour that it is said to have.
SAID_SHARE = 0.35

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    np.float32,
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    np.float32,
)
_FROM_LAB: Floats = np.linalg.inv(_TO_LAB.astype(np.float64)).astype(np.float32)
_FROM_LMS: Floats = np.linalg.inv(_TO_LMS.astype(np.float64)).astype(np.float32)


def _linear(value: npt.NDArray[np.float64]) -> Floats:
    """The sRGB transfer function (IEC 61966-2-1), decoded."""
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)


_LINEAR = _linear(np.arange(256) / 255)
# Its inverse as a table of 4,096 entries, where interpolating would cost more than it gives.
_ENCODED = np.searchsorted((_LINEAR[1:] + _LINEAR[:-1]) / 2, np.arange(4096) / 4095).astype(np.uint8)


def to_oklab(rgb: Bytes) -> Floats:
    """sRGB `(..., 3)` uint8 -> lightness in [0, 1], a, b."""
    lab: Floats = np.cbrt(_LINEAR[rgb] @ _TO_LMS.T) @ _TO_LAB.T
    return lab


def from_oklab(lab: Floats) -> Bytes:
    """The inverse of `to_oklab`; what no screen can show is clipped."""
    linear = (lab @ _FROM_LAB.T) ** 3 @ _FROM_LMS.T
    encoded: Bytes = _ENCODED[(linear.clip(0, 1) * 4095 + 0.5).astype(np.int32)]
    return encoded


_NAMES = (*COLOURS, *NEUTRALS)
_PALETTE = to_oklab(np.array([*COLOURS.values(), *NEUTRALS.values()], np.uint8))


def distance(first: tuple[int, int, int], second: tuple[int, int, int]) -> float:
    """How different two colours look: 1 is black against white."""
    labs = to_oklab(np.array([first, second], np.uint8))
    return float(np.linalg.norm(labs[0] - labs[1]))


def _smoothstep(x: Floats, low: float, high: float) -> Floats:
    t: Floats = ((x - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)


@dataclass(frozen=True)
class Tone:
    """The colours of a drawing.

    Attributes:
        mean: sRGB of its mean colour.
        own: the named colours that each cover at least a quarter of it, the largest first.
        paints: the colours that it can be given so that it is recognisably of that colour.
    """

    mean: tuple[int, int, int]
    own: tuple[str, ...]
    paints: tuple[str, ...]


def shares(rgba: Bytes) -> dict[str, float]:
    """How much of a drawing `(H, W, 4)` each named colour covers, the largest first; transparent pixels left out."""
    lab = to_oklab(rgba[rgba[..., 3] > 127][:, :3])
    if not len(lab):
        return {}
    # Lightness counts half: a shaded red is still red.
    weights = np.array([0.5, 1, 1], np.float32)
    nearest = (((lab[:, None] - _PALETTE) * weights) ** 2).sum(axis=-1).argmin(axis=1)
    counts = np.bincount(nearest, minlength=len(_NAMES))
    return {_NAMES[i]: float(counts[i] / len(lab)) for i in np.argsort(-counts, kind="stable") if counts[i]}


def describe(rgba: Bytes, ink: bool) -> Tone:
    """The colours of a drawing `(H, W, 4)`; `ink` says that it is drawn in one ink, which can have any colour."""
    coarse = rgba[::4, ::4]
    own = tuple(colour for colour, share in shares(rgba[::2, ::2]).items() if share >= OWN_SHARE)
    seen = coarse[coarse[..., 3] > 127][:, :3]
    mean = from_oklab(to_oklab(seen).mean(axis=0)) if len(seen) else np.full(3, 255, np.uint8)
    paints = tuple(COLOURS) if ink else tuple(c for c in COLOURS if is_colour(recolour(coarse, c), c))
    return Tone((int(mean[0]), int(mean[1]), int(mean[2])), own, paints)


def is_colour(rgba: Bytes, colour: str) -> bool:
    """Whether a drawing `(H, W, 4)` would be said to be of this colour."""
    covered = {name: share for name, share in shares(rgba).items() if name in COLOURS}
    return covered.get(colour, 0) >= SAID_SHARE and max(covered, key=lambda name: covered[name]) == colour


def _main_hue(a: Floats, b: Floats, weight: Floats) -> Floats:
    """How much each pixel belongs to the drawing's main hue, in [0, 1]; 1 everywhere if there is no main hue."""
    angle: Floats = np.arctan2(b, a)
    counts, edges = np.histogram(angle, bins=36, range=(-np.pi, np.pi), weights=weight)
    smooth = counts + np.roll(counts, 1) + np.roll(counts, -1)
    peak = int(smooth.argmax())
    off = np.abs((angle - (edges[peak] + edges[peak + 1]) / 2 + np.pi) % (2 * np.pi) - np.pi)
    belongs = 1 - _smoothstep(off.astype(np.float32), float(SAME_HUE), float(OTHER_HUE))
    return belongs if (belongs * weight).sum() >= ONE_HUE * weight.sum() else np.ones_like(belongs)


def recolour(rgba: Bytes, colour: str) -> Bytes:
    """The drawing `(H, W, 4)` in another colour, its shading kept.

    Coloured pixels of the main hue take the new hue and, relative to the mean, keep their chroma; lightness goes along
    a power curve of what is missing to white, which leaves black black and white white. Grey pixels, and so eyes and
    outlines, stay. A drawing that is nearly all grey, such as a sheep's, is shone upon instead: what was white takes
    the colour.
    """
    alpha: Floats = (rgba[..., 3] / 255).astype(np.float32)
    lab = to_oklab(rgba[..., :3])
    lightness = lab[..., 0]
    chroma: Floats = np.hypot(lab[..., 1], lab[..., 2])
    part = _smoothstep(chroma, GREY, COLOURED)
    weight: Floats = part * alpha
    main: Floats = _main_hue(lab[..., 1], lab[..., 2], weight)
    part, weight = part * main, weight * main
    total = float(weight.sum())
    if total <= PALE * float(alpha.sum()):
        return _shone_upon(rgba, colour)
    mean_lightness = min(max(float((weight * lightness).sum()) / total, 0.05), 0.95)
    mean_chroma = float((weight * chroma).sum()) / total
    target = _PALETTE[_NAMES.index(colour)]
    wanted = mean_lightness + LIGHTNESS_SHIFT * (float(target[0]) - mean_lightness)
    new = np.empty_like(lab)
    new[..., 0] = 1 - (1 - lightness.clip(0, 1)) ** (np.log1p(-wanted) / np.log1p(-mean_lightness))
    new[..., 1:] = target[1:] * (chroma / mean_chroma).clip(0, 1.25)[..., None]
    return np.dstack([from_oklab(lab + part[..., None] * (new - lab)), rgba[..., 3]])


def _shone_upon(rgba: Bytes, colour: str) -> Bytes:
    """A drawing in light of one colour: the product of the two, in linear light."""
    linear = _LINEAR[rgba[..., :3]] * _LINEAR[np.array(COLOURS[colour])]
    return np.dstack([_ENCODED[(linear * 4095 + 0.5).astype(np.int32)], rgba[..., 3]])


def painted(rgba: Bytes, colour: str) -> Bytes:
    """A drawing in one ink `(H, W, 4)`, in ink of another colour."""
    return np.dstack([np.broadcast_to(np.array(COLOURS[colour], np.uint8), rgba[..., :3].shape), rgba[..., 3]])


def named(colour: str) -> tuple[int, int, int]:
    """sRGB of a colour name."""
    return COLOURS.get(colour) or NEUTRALS[colour]
