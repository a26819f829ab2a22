"""CFG++ for samplers that have no form of their own for it.

CFG++ (Chung et al. 2024, algorithm 2) takes `x0 = negative + λ (positive - negative)` and adds the noise of the
*negative* answer back: `x' = α' x0 + σ' (x - α negative) / σ`. A sampler that goes straight from x to the answer y,
Euler's or DDIM without eta, computes `x' = y + σ'/σ (x - y)`. Both are equal for

    y = negative + λ α' / (1 - σ'/σ) (positive - negative)

where α = 1 (variance preserving, in units of sigma) and where α = 1 - σ (rectified flow). For these samplers this guide
therefore *is* CFG++, what elsewhere is a sampler called `euler_cfg_pp`. For samplers of higher order it is a guidance
scale that depends on the step and nothing more; the samplers named `..._cfg_pp` are exact.
"""

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from torch import Tensor

from reverie.sampling.guidance import Answers, Guidance
from reverie.sampling.guides import Context, around, guide


@guide("cfg_pp", "cfg++", source="Chung et al. 2024, CFG++, algorithm 2")
def make(
    previous: Guidance,
    context: Context,
    *,
    scale: Annotated[
        float, Field(ge=0, le=10, description="λ of the paper, from 0 to 1; replaces guidance_scale")
    ] = 0.6,
) -> Guidance:
    """Low guidance scales that stay on the manifold; exact with the samplers euler and ddim."""

    def manifold(answers: Answers) -> Tensor:
        if not answers.active:
            return previous.guide(answers)
        answers.want("negative", "positive")
        negative = answers.negative
        share = 1 - min(answers.following / answers.sigma, 1.0)
        if share == 0:  # a step of no length
            return previous.guide(answers)
        stretched = negative + context.process.alpha(answers.following) / share * (answers.positive - negative)
        return previous.guide(answers.replaced(positive=stretched, negative=negative))

    weight = replace(previous.weight, scale=scale, curve="constant")
    return replace(around(previous, manifold), weight=weight)
