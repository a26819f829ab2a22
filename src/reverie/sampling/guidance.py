"""Guidance: a prediction and its conditions become one `denoise`."""

import torch
from torch import Tensor

from reverie.types import Cond, Denoise, Predict


def conditional(predict: Predict, cond: Cond) -> Denoise:
    """One condition, no guidance."""
    return lambda x, sigma: predict(x, sigma, cond)


def classifier_free(predict: Predict, positive: Cond, negative: Cond, scale: float) -> Denoise:
    """`x0 = x0(negative) + scale * (x0(positive) - x0(negative))` (Ho & Salimans 2022, equation 6).

    Both conditions go through the network as one batch. Scale 1 is the positive condition alone.
    """
    if scale == 1:
        return conditional(predict, positive)
    both = Cond(torch.cat([negative.context, positive.context]))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        without, with_prompt = predict(torch.cat([x, x]), sigma, both).chunk(2)
        return without + scale * (with_prompt - without)

    return denoise
