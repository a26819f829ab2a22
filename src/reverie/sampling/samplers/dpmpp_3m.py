"""DPM-Solver++(3M)."""

from typing import Literal

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import SolverType, multistep
from reverie.sampling.registry import sampler
from reverie.types import Denoise, Noise


@sampler("dpmpp_3m", "k_dpmpp_3m", "dpm++3m", order=2, source="Lu et al. 2022, DPM-Solver++, appendix B.4",
         diffusers="DPMSolverMultistepScheduler(solver_order=3)", whole_timesteps=True, extra_point=True,
         unit_start=True, flow=True,
         options=("order", "solver_type", "lower_order_final", "euler_at_final", "eta"))  # fmt: skip
def dpmpp_3m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    order: Literal[1, 2, 3] = 3,
    solver_type: SolverType = "midpoint",
    lower_order_final: bool | None = None,
    euler_at_final: bool = False,
    eta: float = 0.0,
) -> Tensor:
    """Exponential integrator in the log-SNR, from the last three answers; first order to 0.

    The first step is of first order, whose error remains: order 2 in all.

    Args:
        order: combine at most so many answers; 1 is DDIM.
        solver_type: for steps from two answers (the second, and the last but one where there are few).
        lower_order_final: the last two steps are of order 2 and 1; if None, where there are fewer than 15 steps.
        euler_at_final: the last step is of order 1.
        eta: stochasticity: 0 the ODE, 1 diffusers' `sde-dpmsolver++`.

    Raises:
        RequestError: an option that is none of these.
    """
    return multistep(
        denoise, x, sigmas, noise=noise, process=process, order=order, solver_type=solver_type, eta=eta,
        lower_order_final=lower_order_final, euler_at_final=euler_at_final,
    )  # fmt: skip
