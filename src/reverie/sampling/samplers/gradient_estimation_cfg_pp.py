"""Gradient estimation with CFG++."""

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("gradient_estimation_cfg_pp", order=1, unconditional=True, options=("ge_gamma",), flow=True,
         source="Chung et al. 2024, CFG++, on Permenter & Yuan 2024 (gradient estimation), as in ComfyUI")  # fmt: skip
def gradient_estimation_cfg_pp(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    unconditional: Denoise,
    ge_gamma: float = 2.0,
) -> Tensor:
    """`euler_cfg_pp` plus `ge_gamma - 1` times what changed in the unconditional slope; the same guidance scales.

    Args:
        unconditional: x0 of the negative prompt alone, where `denoise` was last asked.
        ge_gamma: 1 is `euler_cfg_pp`.
    """
    old: Tensor | None = None
    for sigma, down in pairs(sigmas):
        x0, negative = denoise(x, sigma), unconditional(x, sigma)
        if down == 0:
            return x0
        slope = (x - negative) / sigma
        x = process.alpha(down) * x0 + (down / sigma) * (x - process.alpha(sigma) * negative)
        if old is not None:
            x = x + (ge_gamma - 1) * (down - sigma) * (slope - old)
        old = slope
    return x
