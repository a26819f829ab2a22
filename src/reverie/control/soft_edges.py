"""Soft edges by HED, and the scribbles that are made of them."""

from pathlib import Path

import numpy as np

from reverie.control.edges import ridges, thickened
from reverie.control.pixels import Floats, Pixels, rgb
from reverie.control.registry import Job, Option, preprocessor

PAPER = "Xie & Tu 2015 (HED)"
MOST = 2048  # pixels: the network takes about 800 MB for a million of them
SAFE_STEPS = 2


@preprocessor(
    "softedge", "softedge_hed", "softedge_hedsafe", "hed", "hed_safe", "HEDdetector",
    summary="soft edges, white on black", source=PAPER, learned="hed", most=MOST,
    options=(Option("safe", False, "few steps of grey, in which no hidden picture survives"),),
)  # fmt: skip
def softedge(picture: Pixels, job: Job, *, safe: bool) -> Pixels:
    """How likely each pixel is an edge that a person would draw."""
    edges = hed(picture, job.weights, job.device)
    if safe:  # ControlNet 1.1: steps of a half, so that the strongest edges alone are white
        edges = np.floor(edges * np.float32(SAFE_STEPS + 1)) / np.float32(SAFE_STEPS)
    return rgb(edges * 255)


@preprocessor(
    "scribble_hed", "fake_scribble_hed",
    summary="a scribble from soft edges, white on black", source=f"{PAPER}; ridges and thickness as in ControlNet 1.1",
    learned="hed", most=MOST, sharp=True,
    options=(
        Option("threshold", 127, "ridges below it are paper", 1, 254),
        Option("thickness", 3.0, "standard deviation of the blur that smooths and thickens", 0.3, 16.0),
    ),
)  # fmt: skip
def scribble_hed(picture: Pixels, job: Job, *, threshold: int, thickness: float) -> Pixels:
    """The ridges of the soft edges, as thick lines."""
    edges = np.floor(hed(picture, job.weights, job.device) * 255)
    thin = ridges(edges, thickness) > threshold
    return rgb(thickened(np.where(thin, np.float32(255), np.float32(0)), thickness))


def hed(picture: Pixels, weights: Path | None, device: str) -> Floats:
    """The probability of an edge, `(H, W)`."""
    import torch

    from reverie.control.weights import hed as layout
    from reverie.control.weights import network

    net = network("hed", weights, device, layout)
    with torch.no_grad():
        x = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None].to(device)
        edges: Floats = net(x).sigmoid()[0, 0].cpu().numpy()
    return edges
