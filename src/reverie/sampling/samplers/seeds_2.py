"""SEEDS-2, an exponential Runge-Kutta method for the diffusion SDE."""

import math
from typing import Literal

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import idle, leg, one_of, sigma_at, within
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("seeds_2", order=0, source="Gonzalez et al. 2023, SEEDS-2, in terms of x0 as in ComfyUI",
         evaluations=lambda n: 2 * n - 1, options=("eta", "r", "solver_type"), flow=True)  # fmt: skip
def seeds_2(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    eta: float = 1.0,
    r: float = 0.5,
    solver_type: Literal["phi_1", "phi_2"] = "phi_1",
) -> Tensor:
    """Two evaluations a step, the second at the fraction `r` of it in log-SNR; both see one path of the noise.

    Args:
        eta: stochasticity, 0 the ODE; with r 1 and phi_2 that is ComfyUI's exp_heun_2_x0.
        r: from 0.01 to 1.
        solver_type: weight of the difference of the two answers: phi_1 / 2 or phi_2.

    Raises:
        RequestError: an option out of range.
    """
    within("eta", eta, 0, 100)
    within("r", r, 0.01, 1)
    one_of("solver_type", solver_type, ("phi_1", "phi_2"))
    for sigma, down in pairs(sigmas):
        x0 = denoise(x, sigma)
        if down == 0:
            return x0
        if idle(sigma, down):
            continue
        whole = leg(process, sigma, down, eta)
        lam, lam_next = process.log_snr(sigma), process.log_snr(down)
        if math.isinf(lam):  # pure noise has no log-SNR, so no place within the step
            x = whole.first_order(x, x0)
            x = x + whole.noise * noise() if eta else x
            continue
        middle = sigma_at(process, lam + r * (lam_next - lam)) if r < 1 else down
        first = leg(process, sigma, middle, eta)
        path = first.noise * noise() if eta else 0.0
        slope = (denoise(first.first_order(x, x0) + path, middle) - x0) / r
        x = whole.first_order(x, x0) + (whole.weight(1) / 2 if solver_type == "phi_1" else whole.weight(2)) * slope
        if eta:
            rest = leg(process, middle, down, eta)
            x = x + rest.keep * path + rest.noise * noise()
    return x
