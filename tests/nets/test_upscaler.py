"""The compact upscaler: its shape, and what the packaged weights do to colours and edges."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import reverie.nets.upscaler as module
from reverie.nets.upscaler import CompactUpscaler, UpscalerConfig

Colour = tuple[int, int, int]
WEIGHTS = Path(module.__file__).parents[1] / "models/upscaler/realesr-animevideov3-x4.safetensors"


@pytest.fixture(scope="module")
def packaged() -> CompactUpscaler:
    net = CompactUpscaler()
    net.load_state_dict(load_file(WEIGHTS), strict=True)
    return net.eval().requires_grad_(False)


def disc(size: int, colour: Colour = (0, 0, 0), ground: Colour = (255, 255, 255)) -> Tensor:
    """Draw a disc, antialiased: (1, 3, size, size) in [0, 1]."""
    fine = Image.new("RGB", (size * 8, size * 8), ground)
    edge = [fraction * size * 8 for fraction in (0.18, 0.22, 0.8, 0.84)]
    ImageDraw.Draw(fine).ellipse(edge, fill=colour)
    pixels = np.asarray(fine.resize((size, size), Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_the_shape(scale: int) -> None:
    net = CompactUpscaler(UpscalerConfig(features=4, convolutions=2, scale=scale))
    assert net(torch.rand(2, 3, 5, 7)).shape == (2, 3, 5 * scale, 7 * scale)


def test_without_detail_pixels_are_repeated() -> None:
    net = CompactUpscaler(UpscalerConfig(features=4, convolutions=1))
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(net(x), x.repeat_interleave(4, 2).repeat_interleave(4, 3))


def test_as_many_channels_out_as_in() -> None:
    with pytest.raises(ValueError, match="channels"):
        CompactUpscaler(UpscalerConfig(out_channels=1))


def test_the_names_are_the_published_ones() -> None:
    names = list(CompactUpscaler().state_dict())
    # 18 convolutions with weight and bias, 17 PReLUs with weight, in one sequence.
    assert names[:4] == ["body.0.weight", "body.0.bias", "body.1.weight", "body.2.weight"]
    assert (names[-1], len(names)) == ("body.34.bias", 18 * 2 + 17)


def test_the_packaged_file_says_where_it_is_from() -> None:
    with safe_open(WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert "BSD-3-Clause" in metadata["license"]
    assert "Real-ESRGAN" in metadata["source"]
    assert "Xintao Wang" in WEIGHTS.with_name("LICENSE").read_text(encoding="utf-8")


def test_the_same_picture_twice(packaged: CompactUpscaler) -> None:
    x = disc(16)
    assert torch.equal(packaged(x), packaged(x))


@pytest.mark.parametrize(
    ("colour", "tolerance"),
    [
        ((0.0, 0.0, 0.0), 0.02),
        ((1.0, 1.0, 1.0), 0.03),
        ((0.5, 0.5, 0.5), 0.04),
        ((0.2, 0.6, 0.9), 0.06),
        # Measured 0.11 in the corners, where the zero padding shows: the published weights drift here.
        ((0.0, 1.0, 0.0), 0.15),
    ],
)
def test_a_flat_colour_stays(packaged: CompactUpscaler, colour: tuple[float, float, float], tolerance: float) -> None:
    flat = torch.tensor(colour).view(1, 3, 1, 1)
    got = packaged(flat.expand(1, 3, 24, 24)).clamp(0, 1)
    assert (got - flat).abs().max() < tolerance


@pytest.mark.parametrize(
    ("colour", "ground", "gain"),
    [
        ((0, 0, 0), (255, 255, 255), 2.5),  # measured 3.0
        ((200, 200, 200), (30, 30, 30), 2.0),  # measured 2.5
        ((255, 200, 60), (255, 255, 255), 1.1),  # measured 1.2: the edge is sharper, the flat colour drifts
    ],
)
def test_a_disc_is_nearer_to_the_truth_than_bicubic(
    packaged: CompactUpscaler, colour: Colour, ground: Colour, gain: float
) -> None:
    small, large = disc(32, colour, ground), disc(128, colour, ground)
    bicubic = F.interpolate(small, scale_factor=4.0, mode="bicubic").clamp(0, 1)
    ours, theirs = (float((y - large).square().mean()) for y in (packaged(small).clamp(0, 1), bicubic))
    assert ours * gain < theirs
