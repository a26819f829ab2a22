"""Guidance rescale."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from reverie.diffusion.parameterisation import PARAMETERISATIONS
from reverie.sampling.guidance import Answers, Guidance
from reverie.sampling.guides import Context, around, guide


@guide("rescale", "guidance_rescale", "rescale_cfg", source="Lin et al. 2023, equations 15 and 16")
def make(
    previous: Guidance,
    context: Context,
    *,
    share: Annotated[float, Field(ge=0, le=1, description="share of the contrast taken back")] = 0.7,
    space: Annotated[
        Literal["output", "v"],
        Field(description="measured on what the network predicts (diffusers), or on v (ComfyUI)"),
    ] = "output",
) -> Guidance:
    """Take back contrast: bring the spread of the guided prediction towards that of the prompt's."""
    measured = PARAMETERISATIONS["v"] if space == "v" else None

    def rescaled(answers: Answers) -> Tensor:
        x0 = previous.guide(answers)
        if share == 0:
            return x0
        guided, positive = answers.output(x0, measured), answers.output(answers.plain.positive, measured)
        matched = guided * (_spread(positive) / _spread(guided))
        return answers.from_output(share * matched + (1 - share) * guided, measured)

    return around(previous, rescaled)


def _spread(x: Tensor) -> Tensor:
    """Standard deviation of each picture, `(B, 1, 1, 1)`."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)
