"""DPM-Solver-fast: a given number of evaluations, mostly in steps of third order."""

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.diffusion.spacing import exponential
from reverie.sampling.registry import sampler
from reverie.sampling.steps import dpm_solver, pairs, renoise, split
from reverie.types import Denoise, Noise


@sampler("dpm_fast", "k_dpm_fast", order=2, source="Lu et al. 2022, DPM-Solver, section 3.4; k-diffusion "
         "sample_dpm_fast", options=("eta", "s_noise"), label="DPM fast", flow=True)  # fmt: skip
def dpm_fast(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Tensor:
    """n evaluations in equal steps of log sigma of order 3, the last of order 1 or 2; only the ends of `sigmas` count.

    Ends at the last sigma above 0 (k-diffusion): where `sigmas` ends in 0, that little noise stays in `x`. A single
    step to 0 is the first answer. The last step of first order leaves order 2 in all, 3 where n - 2 divides by 3.

    Args:
        eta: share of fresh noise.
    """
    levels: list[float] = sigmas.tolist()
    start, end, n = levels[0], levels[-1] or levels[-2], len(levels) - 1
    if start == end:
        return denoise(x, start) if levels[-1] == 0 else x
    orders = [3] * (n // 3 - 1) + [2, 1] if n % 3 == 0 else [3] * (n // 3) + [n % 3]
    for order, (sigma, down) in zip(orders, pairs(exponential(len(orders) + 1, end, start)), strict=True):
        target = max(split(process, sigma, down, eta)[0], end)
        x = dpm_solver(denoise, x, sigma, target, order)[1]
        if eta > 0:
            keep, up = renoise(process, target, down)
            x = keep * x + s_noise * up * noise()
    return x
