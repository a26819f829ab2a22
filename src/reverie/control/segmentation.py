"""Segmentation: every pixel in the colour that ADE20K gives to what it shows."""

import numpy as np

from reverie.control.ade20k import palette
from reverie.control.pixels import Pixels, imagenet, opencv
from reverie.control.registry import Job, preprocessor

SCENE, LONGEST = 512, 2048  # shorter and longest side of what UperNet sees: mmsegmentation's test settings
SIDE, GREY = 513, 127.5  # of what DeepLab sees, and what is around the picture there
# The 20 things of Pascal VOC in its order, each with the class of ADE20K that it is (of a train, the nearest: bus).
THINGS: tuple[tuple[str, int], ...] = (
    ("aeroplane", 90), ("bicycle", 127), ("bird", 126), ("boat", 76), ("bottle", 98), ("bus", 80), ("car", 20),
    ("cat", 126), ("chair", 19), ("cow", 126), ("dining table", 15), ("dog", 126), ("horse", 126),
    ("motorbike", 116), ("person", 12), ("potted plant", 17), ("sheep", 126), ("sofa", 23), ("train", 80),
    ("tv monitor", 89),
)  # fmt: skip


@preprocessor(
    "segmentation", "seg", "seg_ufade20k", "seg_ofade20k", "seg_uniformer", "UniformerDetector",
    summary="the 150 classes of ADE20K in its colours", learned="upernet", sharp=True,
    source="Xiao et al. 2018 (UperNet) on Liu et al. 2022 (ConvNeXt), trained on ADE20K",
)  # fmt: skip
def segmentation(picture: Pixels, job: Job) -> Pixels:
    """Walls, sky, ground and things."""
    import torch
    import torch.nn.functional as F

    from reverie.control.weights import network
    from reverie.control.weights import upernet as layout

    cv2 = opencv()
    net = network("upernet", job.weights, job.device, layout)
    height, width = picture.shape[:2]
    scale = min(SCENE / min(height, width), LONGEST / max(height, width))
    size = (max(round(width * scale), 32), max(round(height * scale), 32))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR)
    with torch.no_grad():
        logits = net(imagenet(small).to(job.device))
        classes = F.interpolate(logits, size=(height, width), mode="bilinear")[0].argmax(dim=0)
    colours: Pixels = palette()[classes.cpu().numpy()]
    return colours


@preprocessor(
    "segmentation_voc", "seg_voc", "segmentation_deeplab",
    summary="20 kinds of things in ADE20K's colours, the rest black", learned="deeplab", sharp=True,
    source="Chen et al. 2017 (DeepLabv3) on MobileNetV2, trained on Pascal VOC",
)  # fmt: skip
def segmentation_voc(picture: Pixels, job: Job) -> Pixels:
    """Persons, animals, vehicles and furniture; not walls, sky or floor, which this network does not know."""
    import torch

    from reverie.control.weights import deeplab as layout
    from reverie.control.weights import network
    from reverie.nets.deeplab import classes_at

    cv2 = opencv()
    net = network("deeplab", job.weights, job.device, layout)
    height, width = picture.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    seen = np.full((SIDE, SIDE, 3), GREY, dtype=np.float32)
    seen[: size[1], : size[0]] = cv2.resize(picture, size, interpolation=how)
    with torch.no_grad():
        logits = net(torch.from_numpy(seen / GREY - 1).permute(2, 0, 1)[None].to(job.device))
    classes = classes_at(logits, (SIDE, SIDE))[0, : size[1], : size[0]].cpu().numpy().astype(np.uint8)
    whole = cv2.resize(classes, (width, height), interpolation=cv2.INTER_NEAREST)
    colours: Pixels = voc_palette()[whole]
    return colours


def voc_palette() -> Pixels:
    """`(21, 3)`: black for the background, then each thing in its colour of ADE20K."""
    things = palette()[[index for _, index in THINGS]]
    return np.concatenate([np.zeros((1, 3), dtype=np.uint8), things])
