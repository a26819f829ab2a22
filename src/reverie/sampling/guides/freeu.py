"""FreeU."""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from reverie.errors import RequestError
from reverie.sampling.guidance import Guidance
from reverie.sampling.guides import Context, guide
from reverie.types import SkipTap, Taps

Factors = dict[int | None, tuple[float, float]]
"""Factors `(b, s)` by the width of the features; under None those for every other width."""
NEUTRAL = (1.0, 1.0)
Factor = Annotated[float, Field(ge=0, le=10)]
CENTRE = 1  # frequencies each side of 0 that are scaled: the low ones; the authors' `threshold`


@guide("freeu", "free_u", source="Si et al. 2023, section 3.2; version 2 as in the authors' later code")
def make(
    previous: Guidance,
    context: Context,
    *,
    b1: Annotated[Factor, Field(description="backbone features of the first stage of the way up")] = 1.5,
    b2: Annotated[Factor, Field(description="backbone features of the second stage")] = 1.6,
    s1: Annotated[Factor, Field(description="low frequencies of the skipped features, first stage")] = 0.9,
    s2: Annotated[Factor, Field(description="low frequencies of the skipped features, second stage")] = 0.2,
    version: Annotated[
        int,
        Field(ge=1, le=2, description="1 scales the backbone evenly, 2 by how strong its features are at each place"),
    ] = 1,
    stages: Annotated[
        Literal["blocks", "widths"],
        Field(description="the first two up blocks (diffusers), or features 4 and 2 times the top's width (ComfyUI)"),
    ] = "blocks",
) -> Guidance:
    """Rebalance the U-Net: stronger backbone features, weaker low frequencies of skipped ones, in every evaluation.

    The defaults are the authors' for Stable Diffusion 1.5; for 2.1 b1 1.4, b2 1.6; for XL b1 1.3, b2 1.4.
    """
    layout, pairs = context.layout, ((b1, s1), (b2, s2))
    if len(layout.up_blocks) < 2:
        raise RequestError("this network has no two up blocks to work on")
    chosen: dict[str, Factors] = {}
    if stages == "blocks":
        chosen = {path: {None: pair} for path, pair in zip(layout.up_blocks, pairs, strict=False)}
    else:
        widths = {None: NEUTRAL, 4 * layout.channels: pairs[0], 2 * layout.channels: pairs[1]}
        chosen = dict.fromkeys(layout.up_blocks, widths)
    skips = {path: _tap(factors, version) for path, factors in chosen.items() if set(factors.values()) != {NEUTRAL}}
    if taken := previous.taps.skips.keys() & skips.keys():
        raise RequestError(f"another guide works on {sorted(taken)[0]} already; FreeU can be there once")
    return replace(previous, taps=previous.taps.with_(Taps(skips=skips)))


def _tap(factors: Factors, version: int) -> SkipTap:
    def tap(features: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        b, s = factors.get(features.shape[1], factors[None])
        if (b, s) == NEUTRAL:
            return features, skip
        half = features.shape[1] // 2
        gain = b if version == 1 else 1 + (b - 1) * _strength(features)
        scaled = torch.cat([features[:, :half] * gain, features[:, half:]], dim=1)
        return scaled, _low_scaled(skip, s)

    return tap


def _strength(features: Tensor) -> Tensor:
    """Mean over the channels, from 0 at its least place to 1 at its greatest: `(B, 1, h, w)`."""
    mean = features.mean(1, keepdim=True)
    low, high = mean.amin((-2, -1), keepdim=True), mean.amax((-2, -1), keepdim=True)
    return (mean - low) / (high - low).clamp(min=torch.finfo(mean.dtype).tiny)


def _low_scaled(x: Tensor, factor: float) -> Tensor:
    """`x (B, C, h, w)` with its lowest spatial frequencies times `factor`; in float32, as FFTs want it."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(x.float(), dim=(-2, -1)), dim=(-2, -1))
    row, column = x.shape[-2] // 2, x.shape[-1] // 2
    low = slice(max(row - CENTRE, 0), row + CENTRE), slice(max(column - CENTRE, 0), column + CENTRE)
    spectrum[..., *low] *= factor
    filtered: Tensor = torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=(-2, -1)), dim=(-2, -1)).real
    return filtered.to(x.dtype)
