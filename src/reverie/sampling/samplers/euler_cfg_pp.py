"""Euler's method (DDIM) with CFG++."""

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("euler_cfg_pp", order=1, source="Chung et al. 2024, CFG++, algorithm 2", unconditional=True, flow=True)
def euler_cfg_pp(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise, process: AnyProcess, unconditional: Denoise
) -> Tensor:
    """Take x0 from the guided answer and the noise to go back from the unconditional one.

    As in ComfyUI, `denoise` is guided by the request's guidance scale as it stands. The paper's lambda, from 0 to 1,
    is that scale, so small scales are wanted here: about 0.6 to 2, where others use 7.

    Args:
        unconditional: x0 of the negative prompt alone, where `denoise` was last asked.
    """
    for sigma, down in pairs(sigmas):
        x0 = denoise(x, sigma)
        eps = (x - process.alpha(sigma) * unconditional(x, sigma)) / sigma
        x = process.alpha(down) * x0 + down * eps
    return x
