"""Previews look like the picture."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import reverie
from reverie.engine.bundle import Model
from reverie.engine.preview import LinearPreview, TinyPreview
from reverie.errors import CheckpointError, RequestError
from reverie.nets.taesd import TinyAutoencoder, TinyAutoencoderConfig, numbered


@pytest.fixture(scope="module")
def model() -> Model:
    return reverie.load(device="cpu", precision="float32")


@pytest.fixture(scope="module")
def latents(model: Model) -> Tensor:
    return model.generate("a red apple", seed=7, steps=8, upscaler="none").latents


def test_a_linear_preview_has_the_pictures_colours(model: Model, latents: Tensor) -> None:
    vae = model.ready("vae", model.parts.vae)
    shown = LinearPreview(vae)(latents)
    with torch.no_grad():
        decoded = (vae.decode(vae.config.unscaled(latents)) / 2 + 0.5).clamp(0, 1)
    small = F.adaptive_avg_pool2d(decoded, (16, 16))
    assert shown.shape == (1, 3, 16, 16)
    error = (shown - small).square().mean()
    assert error < 0.3 * (small - small.mean((2, 3), keepdim=True)).square().mean()


def test_it_is_the_same_every_time(model: Model, latents: Tensor) -> None:
    vae = model.ready("vae", model.parts.vae)
    torch.manual_seed(3)
    first = LinearPreview(vae)(latents)
    torch.manual_seed(4)
    assert torch.allclose(LinearPreview(vae)(latents), first, atol=1e-4)  # kernels may sum in another order


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, TinyAutoencoder]:
    torch.manual_seed(0)
    network = TinyAutoencoder(TinyAutoencoderConfig(width=8)).eval()
    tensors = {k: v.contiguous() for k, v in numbered(network.decoder.state_dict(), "decoder").items()}
    save_file(tensors, tmp_path / "taesd_decoder.safetensors")
    return tmp_path / "taesd_decoder.safetensors", network


def test_a_tiny_decoder_is_read_from_its_file(tiny: tuple[Path, TinyAutoencoder], latents: Tensor) -> None:
    path, network = tiny
    with torch.no_grad():
        want = (network.decode(latents) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(TinyPreview(path, 4)(latents), want)


def test_decoders_of_other_families_and_other_files_are_refused(
    tiny: tuple[Path, TinyAutoencoder], tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="decodes latents of 4 channels; this model's have 16"):
        TinyPreview(tiny[0], 16)
    with pytest.raises(RequestError, match="no tiny decoder at"):
        TinyPreview(tmp_path / "none.safetensors", 4)
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="tiny decoder"):
        TinyPreview(tmp_path / "other.safetensors", 4)
