"""Perpendicular negative prompts."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from reverie.sampling.guidance import Answers, Guidance
from reverie.sampling.guides import Context, along, around, guide


@guide("perp_neg", "perpendicular_negative", "perpneg", source="Armandpour et al. 2023, section 4")
def make(
    previous: Guidance,
    context: Context,
    *,
    scale: Annotated[float, Field(ge=0, le=100, description="weight of the negative prompts")] = 1.0,
) -> Guidance:
    """Guide away only from what the negative prompts do not share with the prompt.

    `empty + w (p - scale * sum of w_i n_i⊥)` with `p = positive - empty` and `n_i⊥` the part of `negative_i - empty`
    that is perpendicular to `p`. With scale 0 it is plain guidance against the empty prompt.
    """

    def perpendicular(answers: Answers) -> Tensor:
        if answers.scale == 1:
            return previous.guide(answers)
        answers.want("empty", *(("negative",) if scale else ()), "positive")
        empty, prompt = answers.empty, answers.positive - answers.empty
        x0 = answers.positive
        for weight, cond in answers.conds.negative if scale else ():
            away = answers.ask(cond) - empty
            x0 = x0 - scale * weight * (away - along(away, prompt))
        return previous.guide(answers.replaced(positive=x0, negative=empty))

    return around(previous, perpendicular, "empty")
