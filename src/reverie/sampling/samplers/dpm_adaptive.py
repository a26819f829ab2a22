"""DPM-Solver with an adaptive step size."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.errors import GenerationError, RequestError
from reverie.sampling.registry import sampler
from reverie.sampling.steps import dpm_solver, renoise, split
from reverie.types import Denoise, Noise

MOST_TRIES = 1000  # a picture takes some dozens
NEAR = 1e-5  # of the end in log sigma: arrived


@dataclass
class StepSize:
    """A PID controller of the step size (Gustafsson 1991; the limiter is that of Söderlind & Wang 2006).

    Attributes:
        h: the step to try next.
        weights: exponents of the inverse errors of this try and the last two accepted ones.
        safety: a try that shrinks the next step below this factor is not accepted.
    """

    h: float
    weights: tuple[float, float, float]
    safety: float
    inverses: list[float] = field(default_factory=list)

    def accepts(self, error: float) -> bool:
        """Whether a try with this error (1 is the tolerance) counts; chooses the next step either way."""
        inverse = 1 / (error + 1e-8)
        self.inverses = [inverse, *(self.inverses[1:] or [inverse, inverse])]
        factor = math.prod(e**w for e, w in zip(self.inverses, self.weights, strict=True))
        factor = 1 + math.atan(factor - 1)
        self.h *= factor
        if factor < self.safety:
            return False
        self.inverses = [inverse, inverse, self.inverses[1]]
        return True


@sampler("dpm_adaptive", "k_dpm_adaptive", "k_dpm_ad", order=3, label="DPM adaptive", adaptive=True, flow=True,
         source="Lu et al. 2022, DPM-Solver, appendix C (DPM-Solver-12 and -23); k-diffusion sample_dpm_adaptive",
         options=("eta", "s_noise", "order", "rtol", "atol", "h_init", "pcoeff", "icoeff", "dcoeff", "accept_safety"),
         evaluations=lambda n: 3 * MOST_TRIES)  # fmt: skip
def dpm_adaptive(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    eta: float = 0.0,
    s_noise: float = 1.0,
    order: Literal[2, 3] = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
) -> Tensor:
    """Steps as long as the difference between two orders allows; only the ends of `sigmas` count.

    Ends at the last sigma above 0 (k-diffusion), of a single step to 0 at the smallest trained one. The error is
    that of the whole batch, and so are the steps: draw pictures one at a time.

    Args:
        eta: share of fresh noise.
        order: of the steps; compared with one order less.
        rtol, atol: tolerated difference, as a share of the values and at least; 0.0078 is one grey level.
        h_init: the first step in log sigma.
        pcoeff, icoeff, dcoeff, accept_safety: the controller's.

    Raises:
        GenerationError: 1000 tries were not enough, or the answers are not finite.
        RequestError: an option is out of range.
    """
    if order not in {2, 3}:
        raise RequestError(f"order of dpm_adaptive is {order}; it can be 2 or 3")
    if min(rtol, atol, h_init) <= 0:
        raise RequestError(f"rtol, atol and h_init of dpm_adaptive are {rtol}, {atol}, {h_init}; each must be above 0")
    levels: list[float] = sigmas.tolist()
    end = levels[-1] or (levels[-2] if len(levels) > 2 else process.sigma_min)
    now, last, previous = -math.log(levels[0]), -math.log(end), x
    b = [w / (1.5 if eta else order) for w in (pcoeff + icoeff + dcoeff, -pcoeff - 2 * dcoeff, dcoeff)]
    size = StepSize(h_init, (b[0], b[1], b[2]), accept_safety)
    for _ in range(MOST_TRIES):
        if now >= last - NEAR:
            return x
        then = min(now + size.h, last)
        sigma, down = math.exp(-now), math.exp(-then)
        target = max(split(process, sigma, down, eta)[0], end)
        low, high = dpm_solver(denoise, x, sigma, target, order)
        tolerated = (rtol * torch.maximum(low.abs(), previous.abs())).clamp(min=atol)
        error = float(torch.linalg.vector_norm((low - high) / tolerated)) / math.sqrt(x.numel())
        if not math.isfinite(error):
            raise GenerationError(f"dpm_adaptive: the error at sigma {sigma:.4g} is {error}; try precision float32")
        if size.accepts(error):
            now, previous, x = then, low, high
            if eta > 0:
                keep, up = renoise(process, target, down)
                x = keep * x + s_noise * up * noise()
    raise GenerationError(
        f"dpm_adaptive came to sigma {math.exp(-now):.4g} of {end:.4g} in {MOST_TRIES} tries; raise rtol or atol"
    )
