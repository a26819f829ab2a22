"""Dynamic thresholding of the guided latents."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from reverie.sampling.curves import numbers, scheduled
from reverie.sampling.guidance import Answers, Guidance
from reverie.sampling.guides import Context, around, guide


@guide("dynamic_thresholding", "dynthresh", "dynamic_threshold",
       source="mcmonkey, sd-dynamic-thresholding; the idea of Saharia et al. 2022 (Imagen), section 2.3")  # fmt: skip
def make(
    previous: Guidance,
    context: Context,
    *,
    mimic_scale: Annotated[float, Field(ge=0, le=100, description="guidance scale whose spread is aimed at")] = 7.0,
    percentile: Annotated[float, Field(ge=0, le=1, description="share of values that are not clamped")] = 1.0,
    mimic_curve: Annotated[str, Field(description="mimic_scale over the steps, as guidance_curve")] = "constant",
    mimic_floor: Annotated[float, Field(ge=0, le=100, description="mimic_scale where its curve is 0")] = 0.0,
    power: Annotated[float, Field(ge=0, le=100, description="of the curves power_*, repeats of *_repeating")] = 1.0,
    channels: Annotated[
        Literal["apart", "together"], Field(description="whether channels are measured apart")
    ] = "apart",
    centre: Annotated[Literal["mean", "zero"], Field(description="what values are shrunk towards")] = "mean",
    measure: Annotated[Literal["max", "std"], Field(description="spread: greatest deviation, or standard")] = "max",
    share: Annotated[float, Field(ge=0, le=1, description="share of the result; the rest is plain guidance")] = 1.0,
) -> Guidance:
    """High guidance scales with the contrast of a low one: shrink what is guided to the spread of `mimic_scale`."""
    numbers(mimic_curve)

    def thresholded(answers: Answers) -> Tensor:
        target = previous.guide(answers)
        if share == 0 or answers.scale == 1:
            return target
        scale = scheduled(mimic_curve, mimic_scale, answers.index, answers.steps, floor=mimic_floor, power=power)
        negative = answers.negative
        mimic = negative + scale * (answers.positive - negative)
        shrunk = _shrunk(target, mimic, channels == "apart", centre == "mean", percentile if measure == "max" else None)
        return share * shrunk + (1 - share) * target

    return around(previous, thresholded)


def _shrunk(target: Tensor, mimic: Tensor, apart: bool, to_mean: bool, percentile: float | None) -> Tensor:
    """`target (B, C, h, w)` with the spread of `mimic`; clamped first where that is the greatest deviation.

    Args:
        percentile: which deviation of `target` is its greatest; None measures standard deviations.
    """
    axes = (-2, -1) if apart else (-3, -2, -1)
    means = target.mean((-2, -1), keepdim=True)
    away, mimic_away = target - means, mimic - mimic.mean((-2, -1), keepdim=True)
    if percentile is None:
        own, aim = away.std(axes, keepdim=True), mimic_away.std(axes, keepdim=True)
    else:
        own, aim = _quantile(away.abs(), percentile, axes), mimic_away.abs().amax(axes, keepdim=True)
    if not to_mean:
        return target * (aim / own)
    if percentile is None:
        return means + away * (aim / own)
    limit = torch.maximum(own, aim)
    return means + away.clamp(-limit, limit) * (aim / limit)


def _quantile(x: Tensor, share: float, axes: tuple[int, ...]) -> Tensor:
    """The quantile over the last axes, which stay as axes of length 1."""
    found = torch.quantile(x.flatten(-len(axes)), share, dim=-1)
    return found[(..., *(None,) * len(axes))]
