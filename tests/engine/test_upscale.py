"""Upscalers by name and from files; tiles of large pictures do not show."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from reverie.engine import upscale
from reverie.engine.upscale import open_upscaler
from reverie.errors import CheckpointError, RequestError

NAME = "realesr-animevideov3-x4"


@pytest.fixture(scope="module")
def esrgan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An ESRGAN with random weights, as spandrel itself builds it, in both kinds of file."""
    pytest.importorskip("spandrel", reason="pip install --no-deps spandrel")
    upscale._spandrel()
    from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

    torch.manual_seed(0)
    network = RRDBNet(num_filters=16, num_blocks=1, scale=2).eval()
    root = tmp_path_factory.mktemp("esrgan")
    tensors = {k: v.contiguous() for k, v in network.state_dict().items()}
    save_file(tensors, root / "esrgan.safetensors")
    torch.save(tensors, root / "esrgan.pth")
    return root, network


@pytest.mark.parametrize("name", ["esrgan.safetensors", "esrgan.pth"])
@torch.no_grad()
def test_a_file_draws_what_its_network_draws(esrgan: tuple[Path, Any], name: str) -> None:
    root, network = esrgan
    found = open_upscaler(str(root / name))
    pixels = torch.rand(1, 3, 24, 40)
    assert found.scale == 2
    assert torch.equal(found.enlarge(pixels), network(pixels).clamp(0, 1))


@torch.no_grad()
def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compact network sees about 18 pixels far; tiles share 64, so that where they meet both are right."""
    network = open_upscaler(NAME)
    pixels = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    whole = network.enlarge(pixels)
    monkeypatch.setattr(upscale, "TILE", 96)
    assert (network.enlarge(pixels) - whole).abs().max() < 2 / 255


def test_what_is_no_upscaler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no upscaler 'nope'"):
        open_upscaler("nope")
    save_file({"weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    pytest.importorskip("spandrel", reason="pip install --no-deps spandrel")
    with pytest.raises(CheckpointError, match="is not an upscaler that spandrel knows"):
        open_upscaler(str(tmp_path / "a.safetensors"))
