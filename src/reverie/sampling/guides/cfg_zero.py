"""CFG-Zero*."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from reverie.sampling.guidance import Answers, Guidance
from reverie.sampling.guides import Context, around, guide


@guide("cfg_zero", "cfg_zero_star", source="Fan et al. 2025, CFG-Zero*, algorithm 1")
def make(
    previous: Guidance,
    context: Context,
    *,
    optimised_scale: Annotated[bool, Field(description="scale the negative prediction onto the prompt's")] = True,
    zero_steps: Annotated[
        int, Field(ge=0, le=1000, description="first steps without movement; 1 for flow models such as SD 3")
    ] = 0,
) -> Guidance:
    """Guidance for flow models: the negative prediction scaled to fit the prompt's, and no movement at first."""

    def fitted(answers: Answers) -> Tensor:
        if answers.index < zero_steps:
            return answers.from_output(torch.zeros_like(answers.x))
        if not optimised_scale or answers.scale == 1:
            return previous.guide(answers)
        answers.want("negative", "positive")
        positive, negative = answers.output(answers.positive), answers.output(answers.negative)
        axes = tuple(range(1, positive.ndim))
        # 1e-8 as in the authors' code: nothing to fit where the negative prediction is nothing
        fit = (positive * negative).sum(axes, keepdim=True) / (negative.square().sum(axes, keepdim=True) + 1e-8)
        return previous.guide(answers.replaced(positive=answers.positive, negative=answers.from_output(fit * negative)))

    return around(previous, fitted)
