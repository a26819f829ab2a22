"""Depth by Depth Anything V2, and the normals of the surface that a depth describes."""

from pathlib import Path

import numpy as np

from reverie.control.pixels import Floats, Pixels, gray, imagenet, opencv, rgb
from reverie.control.registry import Job, Option, preprocessor

PAPER = "Yang et al. 2024 (Depth Anything V2)"
SIDE, PATCH = 518, 14  # of the picture that the network sees; of its patches
LONGEST = 4 * SIDE  # of a panorama
FLAT = 0.4  # the background's share of the depths, which MiDaS' normals leave flat


@preprocessor(
    "depth", "depth_anything_v2", "depth_anything", "depth_midas", "midas", "depth_zoe", "depth_leres",
    "MidasDetector", "ZoeDetector", "DepthAnythingDetector",
    summary="near is white, far is black", source=PAPER, learned="depth_anything",
    options=(Option("invert", False, "near is black"),),
)  # fmt: skip
def depth(picture: Pixels, job: Job, *, invert: bool) -> Pixels:
    """Inverse depth from the farthest to the nearest."""
    values = inverse_depth(picture, job.weights, job.device)
    return rgb((1 - values if invert else values) * 255)


@preprocessor(
    "normal", "normal_bae", "normal_midas", "normal_map", "NormalBaeDetector", "MidasNormalDetector",
    summary="surface normals as colours, from the depth's gradient", learned="depth_anything",
    source=f"{PAPER}; Sobel gradients as ControlNet 1.0 took of MiDaS",
    options=(
        Option("strength", 0.1, "of the view direction against the gradients; less is steeper", 0.001, 10.0),
        Option("background", FLAT, "depths below this share are left flat", 0.0, 1.0),
    ),
)  # fmt: skip
def normal(picture: Pixels, job: Job, *, strength: float, background: float) -> Pixels:
    """What faces left is red, up is green, the viewer is blue: the colours of ControlNet 1.1's normal model."""
    return normals(inverse_depth(picture, job.weights, job.device), strength, background)


@preprocessor(
    "normal_from_depth", "depth_to_normal",
    summary="surface normals of a picture that is a depth map already", source="Sobel gradients, as normal",
    options=(
        Option("strength", 0.1, "of the view direction against the gradients; less is steeper", 0.001, 10.0),
        Option("background", 0.0, "depths below this share are left flat", 0.0, 1.0),
    ),
)  # fmt: skip
def normal_from_depth(picture: Pixels, job: Job, *, strength: float, background: float) -> Pixels:
    """Needs no weights: near is white in the picture that is given."""
    return normals(_spread(gray(picture).astype(np.float32)), strength, background)


def normals(values: Floats, strength: float, background: float) -> Pixels:
    """Unit normals of a depth map `(H, W)` in [0, 1], near is 1; each component from -1..1 to 0..255.

    A surface that comes nearer to the right faces left, one that comes nearer to the bottom faces up.
    """
    cv2 = opencv()
    across = cv2.Sobel(values, cv2.CV_32F, 1, 0, ksize=3)
    up = cv2.Sobel(values, cv2.CV_32F, 0, 1, ksize=3)
    flat = values < background
    vectors = np.dstack([np.where(flat, 0, across), np.where(flat, 0, up), np.full_like(values, strength)])
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    colours: Pixels = (vectors * 127.5 + 127.5).clip(0, 255).astype(np.uint8)
    return colours


def inverse_depth(picture: Pixels, weights: Path | None, device: str) -> Floats:
    """`(H, W)` in [0, 1], the nearest pixel 1 and the farthest 0."""
    import torch

    from reverie.control.weights import depth_anything as layout
    from reverie.control.weights import network

    cv2 = opencv()
    net = network("depth_anything", weights, device, layout)
    height, width = picture.shape[:2]
    rows, columns = seen_size(height, width)
    small = cv2.resize(picture, (columns, rows), interpolation=cv2.INTER_CUBIC)
    with torch.no_grad():
        found = net(imagenet(small).to(device))[0].cpu().numpy()
    return _spread(cv2.resize(found, (width, height), interpolation=cv2.INTER_LINEAR))


def seen_size(height: int, width: int) -> tuple[int, int]:
    """Height and width that the network sees: the side that is nearer to 518 becomes it, both in whole patches."""
    scales = (SIDE / height, SIDE / width)
    scale = min(scales, key=lambda s: abs(1 - s))
    scale = min(scale, LONGEST / max(height, width))
    return max(round(height * scale / PATCH), 1) * PATCH, max(round(width * scale / PATCH), 1) * PATCH


def _spread(values: Floats) -> Floats:
    low, high = float(values.min()), float(values.max())
    spread: Floats = (values - np.float32(low)) / np.float32(max(high - low, 1e-6))
    return spread
