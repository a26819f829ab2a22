"""Self-attention guidance."""

from dataclasses import replace
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from reverie.sampling.guidance import Answers, Guidance, Role
from reverie.sampling.guides import Context, End, Layers, Start, around, guide
from reverie.sampling.tapping import blurred, grid

REACH = 4  # pixels of the blur to each side: a kernel of 9, as in the authors' code


@guide("sag", "self_attention", source="Hong et al. 2023, equations 16 and 25")
def make(
    previous: Guidance,
    context: Context,
    *,
    scale: Annotated[float, Field(ge=0, le=100, description="how strongly it pushes")] = 0.75,
    blur: Annotated[float, Field(gt=0, le=100, description="width of the blur, in latents")] = 1.0,
    threshold: Annotated[
        float, Field(ge=0, description="attention a place receives, 1 on average, to be blurred")
    ] = 1.0,
    layers: Layers = "mid",
    start: Start = 0.0,
    end: End = 1.0,
) -> Guidance:
    """Push away from a blurred picture: x0 loses its detail where the network's own attention is strong.

    What is blurred is the negative answer where there is guidance, else the positive. Of `layers` the first is used.
    """
    path = context.layout.attention_at(layers)[0]

    def sharpened(answers: Answers) -> Tensor:
        x0 = previous.guide(answers)
        if scale == 0 or not answers.within(start, end):
            return x0
        role: Role = "positive" if answers.scale == 1 else "negative"
        plain = answers.plain.of(role)
        degraded = torch.where(_attended(answers, role, path) > threshold, blurred(plain, blur, REACH), plain)
        # the same noise on the degraded picture: x = alpha x0 + sigma noise
        there = answers.at(answers.x + context.process.alpha(answers.sigma) * (degraded - plain))
        push = answers.output(plain) - there.output(there.of(role))
        return answers.from_output(answers.output(x0) + scale * push)

    return replace(around(previous, sharpened), record=previous.record | {path})


def _attended(answers: Answers, role: Role, path: str) -> Tensor:
    """How much attention each place receives, summed over all that look: `(B, 1, H, W)`, 1 on average."""
    height, width = answers.x.shape[-2:]
    received = answers.attention(role, path).sum(1)
    rows, columns = grid(received.shape[1], height, width)
    return F.interpolate(received.view(-1, 1, rows, columns), (height, width))
