"""SA-Solver that asks the network again after each correction."""

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.registry import sampler
from reverie.sampling.samplers.sa_solver import OPTIONS, Order, interval, stochastic_adams
from reverie.types import Denoise, Noise


@sampler("sa_solver_pece", order=0, source="Xue et al. 2023, appendix; orders of ComfyUI's sa_solver_pece",
         evaluations=lambda n: 2 * n - 1, whole_timesteps=True, extra_point=True, unit_start=True,
         options=OPTIONS, flow=True)  # fmt: skip
def sa_solver_pece(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    predictor_order: Order = 3,
    corrector_order: Order = 4,
    simplified: bool = False,
    lower_order_final: bool = True,
    tau: float = 1.0,
    tau_start: float = 800,
    tau_end: float = 200,
) -> Tensor:
    """Predict, evaluate, correct, evaluate: two evaluations a step; see `sa_solver` for the options.

    Raises:
        RequestError: an option out of range.
    """
    return stochastic_adams(
        denoise, x, sigmas, noise=noise, process=process, orders=(predictor_order, corrector_order),
        simplified=simplified, lower_order_final=lower_order_final, tau_of=interval(tau, tau_start, tau_end),
        evaluate_again=True,
    )  # fmt: skip
