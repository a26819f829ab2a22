"""The refined exponential solver in its multistep form, with and without fresh noise."""

import math

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import idle, phi
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs, split
from reverie.types import Denoise, Noise


@sampler("res_multistep", order=2, source="Zhang et al. 2023, Improved Order Analysis and Design of Exponential "
         "Integrator for Diffusion Models Sampling, the multistep scheme", flow=True)  # fmt: skip
def res_multistep(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise, process: AnyProcess) -> Tensor:
    """Exponential integrator in -log sigma, second order from the previous answer; Euler's first step and step to 0."""
    return _second_order(denoise, x, sigmas, noise, process, 0.0, 1.0)


@sampler("res_multistep_ancestral", "res_multistep_a", order=0, options=("eta", "s_noise"), flow=True,
         source="ComfyUI sample_res_multistep_ancestral; noise as in Song et al. 2021 (DDIM), equation 16")  # fmt: skip
def res_multistep_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """A step of res_multistep below the next sigma, then noise up to it."""
    return _second_order(denoise, x, sigmas, noise, process, eta, s_noise)


def _second_order(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, process: AnyProcess, eta: float, s_noise: float
) -> Tensor:
    # the length of the previous step, to where it landed before noise was added (ComfyUI), and its answer
    old: tuple[float, Tensor] | None = None
    for sigma, down in pairs(sigmas):
        x0 = denoise(x, sigma)
        if idle(sigma, down):
            continue
        target, keep, up = split(process, sigma, down, eta)
        x = x0 + (target / sigma) * (x - x0)
        if target > 0:
            h = math.log(sigma / target)
            if old is not None:
                x = x + h**2 / old[0] * phi(2, -h) * (x0 - old[1])
            old = (h, x0)
        if up > 0:
            x = keep * x + s_noise * up * noise()
    return x
