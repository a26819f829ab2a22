"""Seamless networks commute with rolling the picture; the networks they come from are untouched."""

import pytest
import torch

from reverie.nets.autoencoder import Autoencoder, AutoencoderConfig
from reverie.nets.seamless import Axes, seamless
from reverie.nets.unet import UNet, UNetConfig

UNET = UNetConfig(block_out_channels=(16, 32), attention=(True, False), heads=(2, 2), layers_per_block=1,
                  context_width=8, groups=4)  # fmt: skip
DIMENSIONS = {"y": [-2], "x": [-1], "both": [-2, -1]}


@pytest.mark.parametrize("axes", ["x", "y", "both"])
@torch.no_grad()
def test_a_rolled_picture_gives_a_rolled_answer(axes: Axes) -> None:
    torch.manual_seed(0)
    unet = seamless(UNet(UNET).double().eval(), axes)
    x, context, t = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 5, 8).double(), torch.tensor([500.0])
    for dimension in DIMENSIONS[axes]:
        rolled = unet(x.roll(4, dimension), t, context)
        assert torch.allclose(rolled, unet(x, t, context).roll(4, dimension), atol=1e-6)  # time is embedded in float32


@torch.no_grad()
def test_without_it_edges_are_edges() -> None:
    torch.manual_seed(0)
    unet = UNet(UNET).eval()
    x, context, t = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8), torch.tensor([500.0])
    before = unet(x, t, context)
    assert not torch.allclose(unet(x.roll(4, -1), t, context), before.roll(4, -1), atol=1e-3)
    wrapped = seamless(unet, "x")
    assert not torch.allclose(wrapped(x.roll(4, -2), t, context), wrapped(x, t, context).roll(4, -2), atol=1e-3)
    assert torch.equal(unet(x, t, context), before)


def test_weights_are_shared() -> None:
    unet = UNet(UNET)
    wrapped = seamless(unet, "both")
    assert all(a is b for a, b in zip(unet.parameters(), wrapped.parameters(), strict=True))


@torch.no_grad()
def test_decoding_joins_too() -> None:
    torch.manual_seed(0)
    config = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, groups=4)
    vae = seamless(Autoencoder(config).double().eval(), "both")
    z = torch.randn(1, 4, 6, 6).double()
    assert torch.allclose(vae.decode(z.roll(3, -1)), vae.decode(z).roll(6, -1), atol=1e-9)
