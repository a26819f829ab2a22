"""The autoencoder in tiles says what it says in one piece."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import reverie
from reverie.nets import tiling
from reverie.nets.autoencoder import Autoencoder, AutoencoderConfig
from reverie.nets.tiling import decode_tiled, encode_tiled

TILE = 16


@pytest.fixture(scope="module")
def trained() -> Autoencoder:
    """The bundled one: statistics of trained weights, not of random ones."""
    return reverie.load(precision="float32").parts.vae.float()


@pytest.fixture(scope="module")
def latents(trained: Autoencoder) -> Tensor:
    """Of a sharp picture whose halves could not differ more: flat white, and dark noise."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.ones(1, 3, 96, 160)
    picture[..., 70:] = torch.rand(1, 3, 96, 90, generator=generator) - 1
    with torch.no_grad():
        return trained.encode(picture)[0]


@pytest.fixture
def all_passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiling, "PASSES", 12)  # more than there are norms one after another
    monkeypatch.setattr(tiling, "GATHERING_MARGIN", tiling.MARGIN)
    yield


@pytest.mark.usefixtures("all_passes")
@torch.no_grad()
def test_with_enough_passes_decoding_is_exact(trained: Autoencoder, latents: Tensor) -> None:
    whole = trained.decode(latents)
    assert (decode_tiled(trained, latents, TILE) - whole).abs().max() < 1e-4


@pytest.mark.usefixtures("all_passes")
@torch.no_grad()
def test_with_enough_passes_encoding_is_exact(trained: Autoencoder, latents: Tensor) -> None:
    picture = trained.decode(latents)
    for tiled, whole in zip(encode_tiled(trained, picture, TILE), trained.encode(picture), strict=True):
        assert (tiled - whole).abs().max() < 1e-3 * whole.abs().max()


@torch.no_grad()
def test_the_stated_error_and_no_seam(trained: Autoencoder, latents: Tensor) -> None:
    """Of a range of 2: at most 0.05 anywhere, 0.02 on average (root mean square), and not more at the seams."""
    error = (decode_tiled(trained, latents, TILE) - trained.decode(latents)).abs()
    assert error.max() < 0.05
    assert error.square().mean().sqrt() < 0.02
    seams = torch.zeros(error.shape[-2:], dtype=torch.bool)
    step = TILE * trained.config.factor
    for edge in range(step, max(error.shape[-2:]), step):
        seams[edge - 2 : edge + 2, :] = True
        seams[:, edge - 2 : edge + 2] = True
    assert error[..., seams].mean() < 1.5 * error[..., ~seams].mean()


@torch.no_grad()
def test_sharing_statistics_is_what_helps(
    trained: Autoencoder, latents: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained.decode(latents)
    shared = (decode_tiled(trained, latents, TILE) - whole).square().mean()
    monkeypatch.setattr(tiling, "PASSES", 0)
    alone = (decode_tiled(trained, latents, TILE) - whole).square().mean()
    assert shared < alone / 50


@pytest.mark.parametrize("size", [(5, 7), (16, 16), (33, 17)])
@torch.no_grad()
def test_sizes_that_tiles_do_not_divide(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    vae = Autoencoder(AutoencoderConfig(block_out_channels=(8, 16, 16), layers_per_block=1, groups=4)).eval()
    z = torch.randn(2, 4, *size)
    assert decode_tiled(vae, z, 8).shape == (2, 3, size[0] * 4, size[1] * 4)
    mean, log_variance = encode_tiled(vae, torch.randn(2, 3, size[0] * 4, size[1] * 4), 8)
    assert mean.shape == log_variance.shape == z.shape


@torch.no_grad()
def test_the_network_is_left_as_it_was(trained: Autoencoder, latents: Tensor) -> None:
    before = trained.decode(latents[..., :8, :8])
    decode_tiled(trained, latents, TILE)
    assert torch.equal(trained.decode(latents[..., :8, :8]), before)
