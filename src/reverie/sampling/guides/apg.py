"""Adaptive projected guidance."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from reverie.sampling.guidance import Answers, Guidance
from reverie.sampling.guides import Context, along, around, guide


@guide("apg", "adaptive_projected", source="Sadat et al. 2024, algorithm 1")
def make(
    previous: Guidance,
    context: Context,
    *,
    eta: Annotated[float, Field(ge=0, le=1, description="share of the part parallel to the prompt's answer")] = 0.0,
    norm_threshold: Annotated[float, Field(ge=0, description="longest update; 0 is no limit")] = 15.0,
    momentum: Annotated[float, Field(ge=-1, le=1, description="share of earlier updates; negative pushes back")] = -0.5,
    space: Annotated[
        Literal["x0", "output"], Field(description="projected on x0 (the paper), or on what the network predicts")
    ] = "x0",
    form: Annotated[
        Literal["paper", "diffusers"],
        Field(description="positive + (scale - 1) * update, or negative + scale * update"),
    ] = "paper",
) -> Guidance:
    """High guidance scales without oversaturation: drop the update's part along the prompt's own answer."""
    neutral = eta == 1 and norm_threshold == 0 and momentum == 0
    key = object()

    def projected(answers: Answers) -> Tensor:
        if neutral or answers.scale == 1:
            return previous.guide(answers)
        answers.want("negative", "positive")
        positive, negative = answers.positive, answers.negative
        seen = (positive, negative) if space == "x0" else (answers.output(positive), answers.output(negative))
        update = seen[0] - seen[1]
        if momentum:
            update = update + momentum * answers.memory.get(key, 0.0)
            answers.memory[key] = update
        if norm_threshold:
            update = update * (norm_threshold / _length(update)).clamp(max=1)
        parallel = along(update, seen[0])
        update = update - parallel + eta * parallel
        if form == "paper":
            inner = answers.replaced(positive=positive, negative=_in_x0(answers, seen[0] - update, space))
        else:
            inner = answers.replaced(positive=_in_x0(answers, seen[1] + update, space), negative=negative)
        return previous.guide(inner)

    return around(previous, projected)


def _length(x: Tensor) -> Tensor:
    """Euclidean norm of each picture, `(B, 1, 1, 1)`."""
    length: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
    return length


def _in_x0(answers: Answers, x: Tensor, space: str) -> Tensor:
    return x if space == "x0" else answers.from_output(x)
