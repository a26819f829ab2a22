"""The refined exponential solver (RES), multistep, with fresh noise and CFG++."""

from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.registry import sampler
from reverie.sampling.samplers.res_multistep_cfg_pp import res_multistep_cfg_pp
from reverie.types import Denoise, Noise


@sampler("res_multistep_a_cfg_pp", "res_multistep_ancestral_cfg_pp", order=0, unconditional=True, options=("eta",),
         source="as res_multistep_cfg_pp; noise as in Song et al. 2021 (DDIM), equation 16", flow=True)  # fmt: skip
def res_multistep_a_cfg_pp(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    unconditional: Denoise,
    eta: float = 1.0,
) -> Tensor:
    """`res_multistep_cfg_pp` to below the next sigma, then noise up to it; see there for the options."""
    return res_multistep_cfg_pp(denoise, x, sigmas, noise=noise, process=process, unconditional=unconditional, eta=eta)
