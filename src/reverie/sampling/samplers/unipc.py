"""UniPC, the unified predictor-corrector."""

import math
from collections.abc import Collection
from typing import Literal

import numpy as np
from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.sampling.exponential import History, Leg, idle, leg, lowered, one_of, phi
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise

Variant = Literal["bh1", "bh2"]


@sampler("unipc", "uni_pc", "uni_pc_bh2", "k_unipc", order=2, source="Zhao et al. 2023, algorithms 1 and 2, B(h)",
         label="UniPC", diffusers="UniPCMultistepScheduler", discards=("comfy",), whole_timesteps=True,
         extra_point=True, unit_start=True, options=("order", "variant", "lower_order_final"), flow=True)  # fmt: skip
def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise,
    process: AnyProcess,
    order: Literal[1, 2, 3] = 2,
    variant: Variant = "bh2",
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
) -> Tensor:
    """Predict with the answers so far, then correct with the next one, which is not asked again; first order to 0.

    Order 2 as it stands; without `lower_order_final` the corrector makes it `order + 1`.

    Args:
        order: combine at most so many answers.
        variant: B(h) = h (`bh1`: AUTOMATIC1111, ComfyUI's uni_pc) or e^h - 1 (`bh2`: diffusers, uni_pc_bh2).
        lower_order_final: the last steps are of order ..., 2, 1, however many steps there are.
        disable_corrector: steps, counted from 0, whose result is not corrected.

    Raises:
        RequestError: an option that is none of these.
    """
    one_of("order", order, (1, 2, 3))
    one_of("variant", variant, ("bh1", "bh2"))
    steps = pairs(sigmas)
    history: History = []
    predicted: tuple[Tensor, Leg, History, float] | None = None  # the last step: where from, how, its answers, its h
    for step, (sigma, down) in enumerate(steps):
        x0, lam = denoise(x, sigma), process.log_snr(sigma)
        if predicted and step - 1 not in disable_corrector:
            start, way, used, h = predicted
            x = _update(start, way, used, h, variant, x0)
        if down == 0:
            return x0
        if idle(sigma, down):
            predicted = None
            continue
        way, h = leg(process, sigma, down), process.log_snr(down) - lam
        history = [(lam, x0), *history] if math.isfinite(lam) else []
        used = history[: lowered(order, len(history), len(steps) - step, lower_order_final)] or [(lam, x0)]
        history = history[:order]
        predicted = (x, way, used, h)
        x = _update(x, way, used, h, variant)
    return x


def _update(x: Tensor, way: Leg, used: History, h: float, variant: Variant, ahead: Tensor | None = None) -> Tensor:
    """The predictor (UniP) or, with the answer `ahead` at the step's end, the corrector (UniC)."""
    (lam, answer), *older = used
    others = [((other - lam) / h, earlier) for other, earlier in older]
    if ahead is not None:
        others.append((1.0, ahead))
    result = way.first_order(x, answer)
    if others:
        for weight, (ratio, other) in zip(_weights(way.z, [r for r, _ in others], variant), others, strict=True):
            result = result + (way.scale * weight / ratio) * (other - answer)
    return result


def _weights(z: float, ratios: list[float], variant: Variant) -> list[float]:
    """B(h) times the coefficients of equation 5; of one difference it is B(h) / 2, as the paper simplifies.

    Of more, B(h) cancels: they make the rule exact for polynomials.
    """
    if len(ratios) == 1:
        return [(z if variant == "bh1" and math.isfinite(z) else math.expm1(z)) / 2]  # infinite from pure noise
    powers = np.vander(ratios, increasing=True).T
    moments = [z * phi(k + 2, z) * math.factorial(k + 1) for k in range(len(ratios))]
    weights: list[float] = np.linalg.solve(powers, moments).tolist()
    return weights
