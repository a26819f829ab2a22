"""DPM-Solver++(2M)."""

import math

from torch import Tensor

from reverie.diffusion.process import Process
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise

# With fewer steps the last is of first order, for stability (`lower_order_final` of the authors' code and diffusers).
FEW_STEPS = 15


@sampler("dpmpp_2m", "k_dpmpp_2m", "dpm++2m", order=2,
         source="Lu et al. 2022, DPM-Solver++, algorithm 2", label="DPM++ 2M", diffusers="DPMSolverMultistepScheduler",
         whole_timesteps=True, extra_point=True, unit_start=True)  # fmt: skip
def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise, process: Process) -> Tensor:
    """Exponential integrator in the log-SNR lambda, second order from the previous answer; first order to 0."""
    few = len(sigmas) <= FEW_STEPS
    old: tuple[float, Tensor] | None = None
    for step, (sigma, down) in enumerate(pairs(sigmas), 1):
        x0 = denoise(x, sigma)
        if down == 0:
            return x0
        lam, lam_next = process.log_snr(sigma), process.log_snr(down)
        h = lam_next - lam
        if h == 0:  # two timesteps rounded to one, or Karras' last sigma is already the final one
            continue
        estimate = x0
        last = few and step == len(sigmas) - 1
        if old is not None and math.isfinite(old[0]) and not last:
            r = (lam - old[0]) / h
            estimate = x0 + (x0 - old[1]) / (2 * r)
        x = (down / sigma) * x - process.alpha(down) * math.expm1(-h) * estimate
        old = (lam, x0)
    return x
