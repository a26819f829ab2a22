"""The losses."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.diffusion.parameterisation import Parameterisation
from reverie.diffusion.process import Process


def diffusion_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    *,
    process: Process,
    parameterisation: Parameterisation,
    snr_gamma: float | None = None,
) -> Tensor:
    """The denoising loss `w |F(c_in x, t) - target|²` (Ho et al. 2020; EDM, equation 8).

    Args:
        network: `(scaled x, timesteps) -> F`, all that is learned.
        x0, noise: `(B, C, h, w)`.
        timesteps: `(B,)` int64.
        snr_gamma: min-SNR weighting (Hang et al. 2023, equation 7): the squared error of x0 is weighed with
            min(SNR, gamma); None leaves the error of `F` unweighted.

    Returns:
        A scalar, the mean over the batch.
    """
    sigma = process.sigmas[timesteps.cpu()].to(x0)[:, None, None, None]
    k = parameterisation.at(sigma)
    x = process.noised(x0, noise, sigma)
    error = F.mse_loss(
        network(k.into * x, timesteps).float(), parameterisation.target(x0, noise, sigma), reduction="none"
    )
    if snr_gamma is not None:
        error = error * (sigma**-2).clamp(max=snr_gamma) * parameterisation.loss_weight(sigma)
    return error.mean()


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) (Kingma & Welling 2014, appendix B), the mean over all latents."""
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()


def gradient_loss(picture: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring-pixel differences: keeps edges sharp. `(B, 3, H, W)` both."""
    error = picture - target
    return error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


def psnr(picture: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for pictures in [-1, 1]; the mean over the batch."""
    error = (picture.clamp(-1, 1) - target).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(4 / error.clamp(min=1e-10))).mean()
