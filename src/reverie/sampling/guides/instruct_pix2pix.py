"""Guidance by a picture beside the prompt."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from reverie.sampling.guidance import Answers, Guidance
from reverie.sampling.guides import Context, around, guide


@guide("instruct_pix2pix", "ip2p", "image_guidance", source="Brooks et al. 2023, equation 3")
def make(
    previous: Guidance,
    context: Context,
    *,
    scale: Annotated[float, Field(ge=0, le=100, description="how strongly the picture pulls; 1 is no guidance")] = 1.5,
) -> Guidance:
    """Keep to the shown picture: for models whose network sees it in channels of its own.

    `u + w_T (positive - negative) + w_I (negative - u)`, where `negative` sees the picture and `u` neither picture nor
    prompt: guidance by the prompt plus `(w_I - 1) (negative - u)`. The three go through the network as one batch.
    """

    def pictured(answers: Answers) -> Tensor:
        if scale == 1 or not answers.active:
            return previous.guide(answers)
        answers.want("positive", "negative", "image_negative")
        x0 = previous.guide(answers)
        return x0 + (scale - 1) * (answers.plain.negative - answers.image_negative)

    return around(previous, pictured, "image_negative")
