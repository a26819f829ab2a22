"""DPM-Solver, the multistep method in terms of the noise."""

from typing import Literal

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import SolverType, multistep
from reverie.sampling.registry import sampler
from reverie.types import Denoise, Noise


@sampler("dpm_solver", "dpmsolver", order=2, source="Lu et al. 2022, DPM-Solver; multistep as in DPM-Solver++, B.4",
         diffusers="DPMSolverMultistepScheduler(algorithm_type=dpmsolver)", whole_timesteps=True, extra_point=True,
         unit_start=True, flow=True,
         options=("order", "solver_type", "lower_order_final", "euler_at_final"))  # fmt: skip
def dpm_solver(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    order: Literal[1, 2, 3] = 2,
    solver_type: SolverType = "midpoint",
    lower_order_final: bool | None = None,
    euler_at_final: bool = False,
) -> Tensor:
    """Exponential integrator in the log-SNR that interpolates the predicted noise, not x0; first order to 0.

    Args:
        order: combine at most so many answers; 1 is DDIM.
        solver_type: for steps from two answers.
        lower_order_final: the last two steps are of order 2 and 1; if None, where there are fewer than 15 steps.
        euler_at_final: the last step is of order 1.

    Raises:
        RequestError: an option that is none of these.
    """
    return multistep(
        denoise, x, sigmas, noise=noise, process=process, order=order, solver_type=solver_type,
        lower_order_final=lower_order_final, euler_at_final=euler_at_final, quantity="epsilon",
    )  # fmt: skip
