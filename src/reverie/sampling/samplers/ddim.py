"""DDIM."""

from torch import Tensor

from reverie.diffusion.process import Process
from reverie.sampling.registry import sampler
from reverie.sampling.steps import ancestral, landing, pairs, relabelled
from reverie.types import Denoise, Noise


@sampler("ddim", order=1, source="Song et al. 2021, equation 12", label="DDIM", diffusers="DDIMScheduler",
         options=("eta",), whole_timesteps=True, unit_start=True, fixed_stride=True)  # fmt: skip
def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: Process,
    eta: float = 0.0,
    stride: int | None = None,
) -> Tensor:
    """Predict x0, then step along the same noise direction; `eta` of the DDPM noise is fresh (0 none, 1 all).

    Args:
        stride: land this many timesteps below instead of at the next visited sigma, as diffusers does.
    """
    final = float(sigmas[-1])
    for sigma, visited in pairs(sigmas):
        down = landing(process, sigma, visited, stride, final)
        target, up = ancestral(sigma, down, eta)
        x0 = denoise(x, sigma)
        x = x0 + (target / sigma) * (x - x0)
        if up > 0:
            x = x + up * noise()
        x = relabelled(x, process, down, visited)
    return x
