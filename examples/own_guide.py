"""Guidance is a function of what the network says: write a guide, register it, and requests can name it."""

import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import Tensor

import reverie
from reverie.sampling.guidance import Answers, Guidance
from reverie.sampling.guides import Context, around, guide


@guide("calm", source="this example")
def calm(
    previous: Guidance,
    context: Context,
    *,
    most: Annotated[float, Field(gt=0, description="largest value of x0")] = 2.0,
) -> Guidance:
    """Hold x0 within bounds, whatever the guidance scale makes of it."""

    def held(answers: Answers) -> Tensor:
        return previous.guide(answers).clamp(-most, most)

    return around(previous, held)


def main(out: Path) -> None:
    result = reverie.load().generate("a cat", seed=3, steps=10, guidance_scale=9, guides=["calm:most=1.5"])
    result.images[0].save(out)
    print(out, result.request.guides)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "cat.png"))
