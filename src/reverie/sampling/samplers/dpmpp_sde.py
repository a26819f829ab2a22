"""DPM-Solver++ (SDE), two evaluations a step."""

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.errors import RequestError
from reverie.sampling.exponential import idle, sigma_at
from reverie.sampling.registry import sampler
from reverie.sampling.steps import ancestral, pairs
from reverie.types import Denoise, Noise

PURE = 0.9999  # stands in for the sigma of pure noise in rectified flow, whose log-SNR is infinite (ComfyUI)


@sampler("dpmpp_sde", "dpmpp_sde_gpu", "k_dpmpp_sde", order=0, source="k-diffusion sample_dpmpp_sde, after Lu et al. "
         "2022, DPM-Solver++, algorithm 1", options=("eta", "s_noise", "r"), label="DPM++ SDE", spacing="karras",
         diffusers="DPMSolverSDEScheduler", brownian=True, evaluations=lambda n: 2 * n - 1, flow=True)  # fmt: skip
def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Tensor:
    """An ancestral step part of the way, then the whole one with an answer extrapolated from both.

    Args:
        eta: share of fresh noise; 0 is DPM-Solver++(2S).
        r: how far the first step goes, as a share of the log-SNR; above 0, at most 1.
    """
    if not 0 < r <= 1:
        raise RequestError(f"r of dpmpp_sde is {r}; it must be above 0 and at most 1")

    def step(x: Tensor, x0: Tensor, sigma: float, down: float) -> Tensor:
        """An ancestral DDIM step for `x / alpha`, whose noise level is `sigma / alpha` (infinite at pure noise)."""
        alpha, alpha_down = process.alpha(sigma), process.alpha(down)
        target, up = ancestral(sigma / alpha if alpha else float("inf"), down / alpha_down, eta)
        kept = target / sigma
        return alpha_down * (kept * x + (1 - kept * alpha) * x0 + s_noise * up * noise(sigma, down))

    for sigma, down in pairs(sigmas):
        x0 = denoise(x, sigma)
        if down == 0:
            return x0
        if idle(sigma, down):
            continue
        lam, lam_next = process.log_snr(sigma if process.alpha(sigma) else PURE), process.log_snr(down)
        middle = sigma_at(process, lam + r * (lam_next - lam))
        ahead = denoise(step(x, x0, sigma, middle), middle)
        x = step(x, x0 + (ahead - x0) / (2 * r), sigma, down)
    return x
