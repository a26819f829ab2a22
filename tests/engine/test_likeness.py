"""How like two pictures are: each measure against its formula, written again in another way."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from reverie.engine.likeness import MOST_PSNR, lpips, open_lpips, psnr, relative_error, ssim
from reverie.errors import CheckpointError, RequestError


def pictures(height: int = 40, width: int = 33, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(2, height, width, 3, generator=generator)
    return a, (a + torch.tensor([0.02, 0.2])[:, None, None, None] * torch.randn(a.shape, generator=generator)).clamp(
        0, 1
    )


def test_psnr_by_hand() -> None:
    """A difference of 0.1 everywhere is 20 dB; equal pictures are as like as is said of any."""
    a = torch.full((1, 4, 4, 3), 0.5)
    assert float(psnr(a, a + 0.1)) == pytest.approx(20, abs=1e-4)
    assert float(psnr(a, a)) == MOST_PSNR


def test_ssim_against_scipys_filter() -> None:
    """Wang et al.'s constants; windows that leave the picture do not count."""
    a, b = pictures()

    def blurred(x: "np.ndarray") -> "np.ndarray":
        return np.asarray(gaussian_filter(x, 1.5, truncate=3.5))[5:-5, 5:-5]

    for row, found in enumerate(ssim(a, b)):
        values = []
        for channel in range(3):
            x, y = (t[row, :, :, channel].double().numpy() for t in (a, b))
            mx, my, xx, yy, xy = (blurred(t) for t in (x, y, x * x, y * y, x * y))
            top = (2 * mx * my + 0.01**2) * (2 * (xy - mx * my) + 0.03**2)
            values.append((top / ((mx**2 + my**2 + 0.01**2) * (xx - mx**2 + yy - my**2 + 0.03**2))).mean())
        assert float(found) == pytest.approx(float(np.mean(values)), abs=1e-9)
    assert torch.allclose(ssim(a, a), torch.ones(2, dtype=torch.float64))
    assert ssim(a, b)[0] > ssim(a, b)[1]


@pytest.mark.parametrize("side", [1, 2, 8])
def test_ssim_of_pictures_smaller_than_its_window(side: int) -> None:
    a = torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(0))
    assert float(ssim(a, a)) == pytest.approx(1)


def test_the_error_of_latents() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    found = torch.tensor([[3.0, 4.5], [0.0, 2.0]])
    assert relative_error(found, exact).tolist() == [pytest.approx(0.1), 0.0]


# LPIPS


def alexnet() -> nn.Sequential:
    """torchvision's layers of that name."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


def vgg16() -> nn.Sequential:
    """The same of VGG16."""
    layers: list[nn.Module] = []
    source = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        layers += [nn.Conv2d(source, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2, 2)]
        source = width or source
    return nn.Sequential(*layers)


NETWORKS = {
    "alexnet-owt-7be5be79.pth": (alexnet, "alex.pth", (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)),
    "vgg16-397923af.pth": (vgg16, "vgg.pth", (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)),
}


def published(folder: Path, name: str) -> tuple[nn.Sequential, list[Tensor]]:
    """Random weights in two files as they are published; torchvision's has a part that names pictures, too."""
    make, heads, _, widths = NETWORKS[name]
    torch.manual_seed(0)
    network = make().requires_grad_(False)
    weights = [torch.rand(1, width, 1, 1) for width in widths]
    folder.mkdir(exist_ok=True)
    features = {f"features.{key}": t for key, t in network.state_dict().items()}
    torch.save(features | {"classifier.6.bias": torch.zeros(1000)}, folder / name)
    torch.save({f"lin{i}.model.1.weight": t for i, t in enumerate(weights)}, folder / heads)
    return network, weights


@pytest.mark.parametrize("name", NETWORKS)
def test_lpips_equals_its_equation(tmp_path: Path, name: str) -> None:
    """Zhang et al. 2018, equation 1, layer by layer; float32, relative 1e-4."""
    network, weights = published(tmp_path, name)
    a, b = (t[:1] for t in pictures(64, 72))
    shift, scale = (torch.tensor(v)[:, None, None] for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    total, seen = 0.0, [((2 * t.permute(0, 3, 1, 2) - 1) - shift) / scale for t in (a, b)]
    for i, module in enumerate(network):
        seen = [module(t) for t in seen]
        if i in NETWORKS[name][2]:
            x, y = (F.normalize(t, dim=1) for t in seen)
            weight = weights[NETWORKS[name][2].index(i)]
            total += float(((x - y) ** 2 * weight).sum(1).mean())
    found = float(lpips(open_lpips(tmp_path), a, b))
    assert found == pytest.approx(total, rel=1e-4)
    assert not math.isclose(found, 0)
    assert float(lpips(open_lpips(tmp_path), a, a)) == 0


def test_small_pictures_are_enlarged_for_lpips(tmp_path: Path) -> None:
    published(tmp_path, "alexnet-owt-7be5be79.pth")
    network = open_lpips(tmp_path)
    a, b = pictures(16, 24)
    large = [t.repeat_interleave(4, 1).repeat_interleave(4, 2) for t in (a, b)]
    assert torch.equal(lpips(network, a, b), lpips(network, *large))


def test_a_folder_without_lpips_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no LPIPS in .*; it must hold torchvision's alexnet-owt"):
        open_lpips(tmp_path)
    network, _ = published(tmp_path, "alexnet-owt-7be5be79.pth")
    state = {f"features.{key}": t for key, t in network.state_dict().items()}
    del state["features.3.weight"]
    torch.save(state, tmp_path / "alexnet-owt-7be5be79.pth")
    with pytest.raises(CheckpointError, match=r"LPIPS in .* does not fit: 1 tensor \(features.3.weight\) missing"):
        open_lpips(tmp_path)
