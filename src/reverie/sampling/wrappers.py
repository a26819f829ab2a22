"""Wrappers around `denoise`: what elsewhere needs callbacks inside every sampler."""

from collections.abc import Callable

import torch
from torch import Tensor

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
