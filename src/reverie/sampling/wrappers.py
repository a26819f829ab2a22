"""Wrappers around `denoise`: what elsewhere needs callbacks inside every sampler."""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from reverie.diffusion.process import AnyProcess
from reverie.errors import GenerationError
from reverie.types import Denoise


def watched(denoise: Denoise, tell: Callable[[float, Tensor], None]) -> Denoise:
    """Call `tell(sigma, x0)` after every evaluation: progress and previews."""

    def wrapper(x: Tensor, sigma: float) -> Tensor:
        x0 = denoise(x, sigma)
        tell(sigma, x0)
        return x0

    return wrapper


def checked(denoise: Denoise) -> Denoise:
    """Stop at the first answer that is not finite, instead of drawing a black picture.

    Raises:
        GenerationError: NaN or infinity.
    """

    def wrapper(x: Tensor, sigma: float) -> Tensor:
        x0 = denoise(x, sigma)
        if not torch.isfinite(x0).all():
            raise GenerationError(
                f"the network's answer at sigma {sigma:.4g} is not finite; "
                "try precision float32 or a lower guidance scale"
            )
        return x0

    return wrapper


def masked(denoise: Denoise, mask: Tensor, known: Tensor, noise: Tensor, process: AnyProcess, free: float) -> Denoise:
    """Draw inside the mask only; outside, `x` is always the known latents with their noise.

    As diffusers' inpainting pipeline, which puts the noised picture back after every step: every sampler is a
    function of `x` and the answers pixel by pixel, so that doing it before every evaluation is the same.

    Args:
        mask: broadcastable to `known`; 1 where it is drawn.
        known: `(B, C, h, w)`, the picture's latents.
        noise: like `known`, the noise it is kept with.
        free: from this sigma up `x` is left alone: a sampler that starts from pure noise has no picture yet.
    """

    def wrapper(x: Tensor, sigma: float) -> Tensor:
        if sigma < free:
            x = torch.where(mask > 0, x, process.noised(known, noise, x.new_tensor(sigma)))
        return torch.where(mask > 0, denoise(x, sigma), known)

    return wrapper


Window: TypeAlias = tuple[slice, slice]
"""Rows and columns of latents."""


def windowed(denoisers: Sequence[tuple[Window, Denoise]], overlap: int) -> Denoise:
    """Evaluate in overlapping windows and average them where they meet (Bar-Tal et al. 2023, MultiDiffusion).

    Args:
        denoisers: for each window one of its own: guidance may remember, and look at, what it sees.
        overlap: latents over which windows fade into each other.
    """

    def wrapper(x: Tensor, sigma: float) -> Tensor:
        total, weights = torch.zeros_like(x), x.new_zeros(x.shape[-2:])
        for (rows, columns), denoise in denoisers:
            answer = denoise(x[..., rows, columns], sigma)
            weight = (fade(answer.shape[-2], overlap)[:, None] * fade(answer.shape[-1], overlap)).to(x)
            total[..., rows, columns] += weight * answer
            weights[rows, columns] += weight
        return total / weights

    return wrapper


def windows(height: int, width: int, size: int, overlap: int) -> list[Window]:
    """The fewest windows that cover latents of this size."""
    columns = spans(width, size, overlap)
    return [(row, column) for row in spans(height, size, overlap) for column in columns]


def spans(length: int, size: int, overlap: int) -> list[slice]:
    """The fewest windows of `size` that cover `length` and share `overlap` at least, evenly placed."""
    if length <= size:
        return [slice(0, length)]
    count = math.ceil((length - overlap) / max(size - overlap, 1))
    starts = [round(i * (length - size) / (count - 1)) for i in range(count)]
    return [slice(start, start + size) for start in starts]


def fade(length: int, overlap: int) -> Tensor:
    """Weights that rise over `overlap` at both ends of a window, never 0: `(length,)`."""
    steps = torch.arange(1, length + 1, dtype=torch.float32)
    return torch.minimum(steps, steps.flip(0)).clamp(max=max(overlap, 1)) / max(overlap, 1)
