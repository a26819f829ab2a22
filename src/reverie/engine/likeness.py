"""How like two drawings of one request are: PSNR, SSIM, the relative error of latents, LPIPS."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.checkpoint.load import build
from reverie.checkpoint.source import open_weights
from reverie.errors import RequestError
from reverie.nets.lpips import ALEXNET, VGG16, Lpips, named

MOST_PSNR = 100.0  # dB; said of equal pictures, for which it is infinite
WINDOW, SIGMA = 11, 1.5  # of the Gaussian in SSIM; Wang et al. 2004, section III.B
K1, K2 = 0.01, 0.03  # the same
SMALLEST = 64  # pixels of a side for LPIPS: the authors', of whose judgements it was learnt
# Files of LPIPS in a folder: the published names of a network for features, those of its weights by channel.
NETWORKS = ((ALEXNET, "alexnet*", "alex.*"), (VGG16, "vgg16*", "vgg.*"))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal to noise of pictures `(N, H, W, C)` in [0, 1], in dB: `(N,)`, at most `MOST_PSNR`."""
    error = (a.double() - b.double()).square().mean((1, 2, 3))
    return -10 * error.clamp(min=10 ** (-MOST_PSNR / 10)).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of pictures `(N, H, W, C)` in [0, 1]: `(N,)` (Wang et al. 2004, equation 13).

    Mean over all windows that lie in the picture whole, and over the colours.
    """
    x, y = (t.double().movedim(-1, 1) for t in (a, b))
    size = min(WINDOW, *(side - (side + 1) % 2 for side in x.shape[-2:]))
    places = torch.arange(size, dtype=torch.float64) - size // 2
    kernel = torch.exp(-0.5 * (places / SIGMA) ** 2)
    kernel = kernel / kernel.sum()

    def blurred(t: Tensor) -> Tensor:
        flat = t.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1)).view(*t.shape[:2], -1)

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    both = blurred(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + K1**2) * (2 * both + K2**2)
    return (likeness / ((mean_x**2 + mean_y**2 + K1**2) * (var_x + var_y + K2**2))).mean((1, 2))


def relative_error(found: Tensor, exact: Tensor) -> Tensor:
    """`|found - exact| / |exact|` of each row of `(N, ...)`: `(N,)`."""
    found, exact = found.double().flatten(1), exact.double().flatten(1)
    length: Tensor = torch.linalg.vector_norm(exact, dim=1).clamp(min=math.ulp(1.0))
    difference: Tensor = torch.linalg.vector_norm(found - exact, dim=1)
    return difference / length


@torch.no_grad()
def lpips(network: Lpips, a: Tensor, b: Tensor) -> Tensor:
    """LPIPS of pictures `(N, H, W, 3)` in [0, 1]: `(N,)`; small ones are enlarged first."""
    short = min(a.shape[1:3])
    factor = max(-(-SMALLEST // short), 1)
    x, y = (F.interpolate(t.float().movedim(-1, 1), scale_factor=float(factor)) for t in (a, b))
    found: Tensor = network(x, y)
    return found


def open_lpips(folder: Path) -> Lpips:
    """The network from a folder with two published files, torchvision's and the authors' (safetensors or torch).

    `alexnet-owt-7be5be79.pth` and `alex.pth`, or `vgg16-397923af.pth` and `vgg.pth` (of lpips 0.1).

    Raises:
        RequestError: they are not there.
        CheckpointError: a file that is broken or another network's.
    """
    for backbone, features, heads in NETWORKS:
        files = [sorted(folder.expanduser().glob(pattern)) for pattern in (features, heads)]
        if all(files):
            tensors = [
                {n: file.tensor(n).float() for n in file.tensors} for file in (open_weights(f[0]) for f in files)
            ]
            return build(lambda: Lpips(backbone), named(*tensors), f"LPIPS in {folder}")  # noqa: B023
    raise RequestError(
        f"no LPIPS in {folder}; it must hold torchvision's alexnet-owt-7be5be79.pth and the authors' alex.pth, or "
        "vgg16-397923af.pth and vgg.pth"
    )
