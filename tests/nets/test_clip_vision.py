"""CLIP's image encoder and its preprocessing, without an oracle; against transformers: tests/parity."""

import numpy as np
import pytest
import torch
from PIL import Image

from reverie.errors import RequestError
from reverie.nets.clip_vision import MEAN, STD, ClipVision, ClipVisionConfig, clip_pixels

SMALL = ClipVisionConfig(
    width=32, inner_width=48, layers=3, heads=4, image_size=28, patch=14, projection_width=12, activation="gelu"
)


def network(**settings: int) -> ClipVision:
    torch.manual_seed(0)
    return ClipVision(ClipVisionConfig(**{**SMALL.__dict__, **settings})).eval()


@torch.no_grad()
def test_shapes() -> None:
    pixels = torch.randn(2, 3, 28, 28)
    assert SMALL.positions == 5
    assert network()(pixels).shape == (2, 12)
    assert network(projection_width=0)(pixels).shape == (2, 32)
    assert network().states(pixels).shape == (2, 5, 32)


@torch.no_grad()
def test_every_patch_sees_every_other() -> None:
    """A causal encoder would not tell the first patches of the last."""
    pixels = torch.randn(1, 3, 28, 28)
    changed = pixels.clone()
    changed[..., -1, -1] += 1
    difference = (network().states(pixels) - network().states(changed)).abs().amax(dim=(0, 2))
    assert (difference > 1e-5).all()


@torch.no_grad()
def test_states_before_the_last_layers() -> None:
    pixels = torch.randn(1, 3, 28, 28)
    net = network()
    x = net.states(pixels, 1)
    assert torch.equal(net.vision_model.encoder.layers[2](x), net.states(pixels))
    assert torch.equal(net.states(pixels, 3), net.vision_model.pre_layrnorm(net.vision_model.embeddings(pixels)))


def test_pixels_of_another_size_are_refused() -> None:
    with pytest.raises(RequestError, match="takes pictures of 3 x 28 x 28 and was given 3 x 28 x 42"):
        network()(torch.zeros(1, 3, 28, 42))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_plain_picture_is_a_plain_square(mode: str) -> None:
    grey = Image.new("RGB", (300, 200), (128, 128, 128)).convert(mode)
    pixels = clip_pixels(grey)
    assert pixels.shape == (1, 3, 224, 224)
    want = (128 / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(pixels, want[:, None, None].expand_as(pixels[0]), atol=1e-6)


@pytest.mark.parametrize("size", [(60, 20), (20, 60)])
def test_the_middle_is_seen(size: tuple[int, int]) -> None:
    """White in the middle third, black on both sides."""
    array = np.zeros((60, 20, 3), dtype=np.uint8)
    array[20:40] = 255
    picture = Image.fromarray(array if size == (20, 60) else array.transpose(1, 0, 2))
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(clip_pixels(picture, 28)[0, :, 14, 14], white)
    assert clip_pixels(picture, 28).mean() > 1.5


def test_a_strip_is_refused() -> None:
    with pytest.raises(RequestError, match="the square in its middle"):
        clip_pixels(Image.new("RGB", (1, 200)))
