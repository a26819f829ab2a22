"""Smoothed energy guidance."""

from typing import Annotated

from pydantic import Field

from reverie.sampling.guidance import Answers, Guidance
from reverie.sampling.guides import Context, End, Layers, Start, away_from, guide
from reverie.sampling.tapping import smoothed
from reverie.types import Taps

INFINITE = 9999.0  # from here up queries are averaged over the whole picture; the authors' code


@guide("seg", "smoothed_energy", source="Hong 2024, Smoothed Energy Guidance, section 3.3")
def make(
    previous: Guidance,
    context: Context,
    *,
    scale: Annotated[float, Field(ge=0, le=100, description="how strongly it pushes")] = 3.0,
    blur: Annotated[
        float, Field(ge=0, description="width of the blur in tokens; from 9999 up all are averaged")
    ] = 10.0,
    layers: Layers = "mid",
    start: Start = 0.0,
    end: End = 1.0,
) -> Guidance:
    """Push away from a picture without detail: named self-attention layers ask with blurred queries."""
    paths = context.layout.attention_at(layers)
    sigma = float("inf") if blur >= INFINITE else blur

    def taps(answers: Answers) -> Taps:
        height, width = answers.x.shape[-2:]
        return Taps(attention=dict.fromkeys(paths, smoothed(sigma, height, width)))

    return away_from(previous, taps, scale if blur else 0.0, start, end)
