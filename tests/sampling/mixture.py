"""A mixture of Gaussians, whose denoiser is known in closed form: what a perfectly trained network would say."""

import torch
from torch import Tensor

MEANS = torch.tensor([[-1.0, 0.5, 2.0, -0.3], [0.7, -1.2, 0.1, 1.1], [2.2, 0.9, -0.8, -2.0]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
SPREAD = 0.3  # standard deviation of each Gaussian


def posterior_mean(x: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
    """E[x0 | x] for `x = alpha x0 + sigma noise`, x0 from the mixture over channels; `x (B, 4, h, w)`."""
    means, weights = MEANS.to(x.dtype), WEIGHTS.to(x.dtype)
    variance = alpha**2 * SPREAD**2 + sigma**2
    pixels = x.movedim(1, -1)[..., None, :]  # (B, h, w, 1, 4)
    logits = weights.log() - ((pixels - alpha * means) ** 2).sum(-1) / (2 * variance)
    towards = means + alpha * SPREAD**2 / variance * (pixels - alpha * means)
    return (logits.softmax(-1)[..., None] * towards).sum(-2).movedim(-1, 1)


def denoise(x: Tensor, sigma: float) -> Tensor:
    """The denoiser of variance-preserving models, `x` in units of sigma."""
    return posterior_mean(x, sigma)


def denoise_flow(x: Tensor, sigma: float) -> Tensor:
    """The denoiser of rectified flow, `x = (1 - sigma) x0 + sigma noise`."""
    return posterior_mean(x, sigma, 1 - sigma)
