"""DPM-Solver++(3M) for the SDE."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import History, derivatives, idle, leg
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "k_dpmpp_3m_sde", order=0, source="k-diffusion sample_dpmpp_3m_sde; "
         "Lu et al. 2022, DPM-Solver++, appendix B.4", options=("eta", "s_noise"), label="DPM++ 3M SDE",
         spacing="exponential", brownian=True, discards=("a1111",), flow=True)  # fmt: skip
def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Exponential integrator in the log-SNR, third order from the last three answers once there are three.

    Args:
        eta: 0 the ODE, 1 the reverse-time SDE.
    """
    history: History = []
    for sigma, down in pairs(sigmas):
        x0 = denoise(x, sigma)
        if down == 0:
            return x0
        if idle(sigma, down):
            continue
        way, lam, found = leg(process, sigma, down, eta), process.log_snr(sigma), [x0]
        if math.isfinite(lam):  # pure noise has no place on the clock
            history = [(lam, x0), *history][:3]
            found = derivatives(history, process.log_snr(down) - lam)
        x = way.keep * x
        for k, derivative in enumerate(found, 1):
            x = x + way.weight(k) * derivative
        if way.noise > 0:
            x = x + s_noise * way.noise * noise(sigma, down)
    return x
