"""DPM-Solver++(2M)."""

from torch import Tensor

from reverie.diffusion.process import AnyProcess, EdmProcess
from reverie.sampling.exponential import SolverType, multistep
from reverie.sampling.registry import sampler
from reverie.types import Denoise, Noise


@sampler("dpmpp_2m", "k_dpmpp_2m", "dpm++2m", order=2,
         source="Lu et al. 2022, DPM-Solver++, algorithm 2", label="DPM++ 2M", diffusers="DPMSolverMultistepScheduler",
         options=("solver_type", "lower_order_final", "euler_at_final", "log_sigma"), spacing="karras",
         whole_timesteps=True, extra_point=True, unit_start=True, flow=True)  # fmt: skip
def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    solver_type: SolverType = "midpoint",
    lower_order_final: bool | None = None,
    euler_at_final: bool = False,
    log_sigma: bool = False,
) -> Tensor:
    """Exponential integrator in the log-SNR, second order from the previous answer; first order to 0.

    Args:
        solver_type: how the previous answer is weighted.
        lower_order_final: the last step is of first order; if None, where there are fewer than 15 steps (diffusers).
            Never in k-diffusion, AUTOMATIC1111 and ComfyUI.
        euler_at_final: the last step is of first order.
        log_sigma: the clock is -log sigma for rectified flow too (ComfyUI).
    """
    clock = EdmProcess() if log_sigma else process  # dx/dsigma = (x - x0) / sigma is the same equation for both
    return multistep(
        denoise, x, sigmas, noise=noise, process=clock, order=2, solver_type=solver_type,
        lower_order_final=lower_order_final, euler_at_final=euler_at_final,
    )  # fmt: skip
