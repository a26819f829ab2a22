"""The tiny autoencoder: its two layouts, its units."""

import pytest
import torch

from reverie.errors import CheckpointError
from reverie.nets import taesd
from reverie.nets.taesd import TAESD, TAESD3, Half, TinyAutoencoder, TinyAutoencoderConfig, TinyDecoder, TinyEncoder

SMALL = TinyAutoencoderConfig(width=8)
HALVES: tuple[Half, ...] = ("encoder", "decoder")

# The modules with weights of the original files, counted off taesd.py of madebyollin/taesd: a clamp, a convolution and
# a ReLU begin the decoder, `B` is a block of three convolutions, `c` a convolution, `u` one without bias.
ORIGINAL = {"encoder": "cBuBBBuBBBuBBBc", "decoder": "-c-BBB-uBBB-uBBB-uBc"}


def original_names(half: str) -> list[str]:
    names = []
    for number, kind in enumerate(ORIGINAL[half]):
        if kind in "cu":
            names += [f"{number}.weight", f"{number}.bias"][: 1 if kind == "u" else 2]
        if kind == "B":
            names += [f"{number}.conv.{k}.{leaf}" for k in (0, 2, 4) for leaf in ("weight", "bias")]
    return names


def half_of(network: TinyAutoencoder, half: Half) -> dict[str, torch.Tensor]:
    return dict(network.get_submodule(half).state_dict())


@pytest.mark.parametrize("half", HALVES)
def test_original_names(half: Half) -> None:
    tensors = half_of(TinyAutoencoder(SMALL), half)
    assert list(taesd.numbered(tensors, half)) == original_names(half)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("prefix", [True, False])
def test_both_layouts_and_back(half: Half, prefix: bool) -> None:
    tensors = half_of(TinyAutoencoder(SMALL), half)
    file = {f"taesd_{half}.{name}" if prefix else name: t for name, t in taesd.numbered(tensors, half).items()}
    back = taesd.renumbered(file, half)
    assert list(back) == list(tensors)
    assert all(back[name] is tensors[name] for name in tensors)


@pytest.mark.parametrize("name", ["0.weight", "layers.0.weight", "encoder.layers.0.weight", "7", "-1.weight", ""])
def test_a_name_of_another_layout_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="none of a tiny decoder"):
        taesd.renumbered({name: torch.zeros(1)}, "decoder")


@pytest.mark.parametrize("config", [TAESD, TAESD3, TinyAutoencoderConfig(latent_channels=3, width=32)])
@pytest.mark.parametrize("half", HALVES)
def test_the_shapes_tell_the_config(config: TinyAutoencoderConfig, half: Half) -> None:
    with torch.device("meta"):
        network = TinyEncoder(config) if half == "encoder" else TinyDecoder(config)
    shapes = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    assert taesd.config_from_shapes(shapes, half) == config


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("shapes", [{}, {"layers.0.weight": (8, 4)}, {"layers.0.weight": (), "layers.14.weight": ()}])
def test_other_shapes_are_refused(shapes: dict[str, tuple[int, ...]], half: Half) -> None:
    with pytest.raises(CheckpointError, match="no convolution"):
        taesd.config_from_shapes(shapes, half)


@torch.no_grad()
def test_eight_pixels_a_latent() -> None:
    network = TinyAutoencoder(SMALL)
    assert SMALL.factor == 8
    latents = network.encode(torch.zeros(2, 3, 32, 48))
    assert latents.shape == (2, 4, 4, 6)
    assert network.decode(latents).shape == (2, 3, 32, 48)
    assert torch.equal(network(torch.zeros(2, 3, 32, 48)), network.decode(latents))


@torch.no_grad()
def test_wild_latents_are_squashed() -> None:
    """Beyond the magnitude of 3 there is hardly a difference; within a tenth of it hardly any squashing."""
    torch.manual_seed(0)
    decoder = TinyDecoder(SMALL)
    z = torch.randn(1, 4, 4, 4).sign()
    torch.testing.assert_close(decoder(z * 1e3), decoder(z * 1e6))
    plain = decoder.layers(z * 0.03) * 2 - 1
    torch.testing.assert_close(decoder(z * 0.03), plain, atol=1e-4, rtol=0)
