"""DPM-Solver++(2M) for the SDE, in its midpoint and Heun forms."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import SolverType, idle, leg
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "k_dpmpp_2m_sde", "dpm++2m_sde", "dpm++2m_sde_bt", order=0,
         source="Lu et al. 2022, DPM-Solver++, section 5 and appendix; k-diffusion sample_dpmpp_2m_sde",
         options=("eta", "s_noise"), label="DPM++ 2M SDE", spacing="exponential", brownian=True,
         flow=True)  # fmt: skip
def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Exponential integrator in the log-SNR, second order from the previous answer by the midpoint rule.

    Args:
        eta: 0 the ODE, 1 the reverse-time SDE.
    """
    return _second_order(denoise, x, sigmas, noise, process, eta, s_noise, "midpoint")


@sampler("dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "k_dpmpp_2m_sde_heun", order=0,
         source="k-diffusion sample_dpmpp_2m_sde with solver_type heun", options=("eta", "s_noise"),
         label="DPM++ 2M SDE Heun", spacing="exponential", brownian=True, flow=True)  # fmt: skip
def dpmpp_2m_sde_heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """As dpmpp_2m_sde, with the previous answer weighted as the exponential integral of a straight line.

    Args:
        eta: 0 the ODE, 1 the reverse-time SDE.
    """
    return _second_order(denoise, x, sigmas, noise, process, eta, s_noise, "heun")


def _second_order(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    process: AnyProcess,
    eta: float,
    s_noise: float,
    solver_type: SolverType,
) -> Tensor:
    old: tuple[float, Tensor] | None = None
    for sigma, down in pairs(sigmas):
        x0 = denoise(x, sigma)
        if down == 0:
            return x0
        if idle(sigma, down):
            continue
        way, lam = leg(process, sigma, down, eta), process.log_snr(sigma)
        x = way.first_order(x, x0)
        if old is not None:
            change = (x0 - old[1]) * ((process.log_snr(down) - lam) / (lam - old[0]))
            x = x + (way.weight(1) / 2 if solver_type == "midpoint" else way.weight(2)) * change
        if way.noise > 0:
            x = x + s_noise * way.noise * noise(sigma, down)
        old = (lam, x0) if math.isfinite(lam) else None  # pure noise has no place on the clock
    return x
