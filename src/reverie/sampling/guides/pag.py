"""Perturbed-attention guidance."""

from typing import Annotated

from pydantic import Field

from reverie.sampling.guidance import Guidance
from reverie.sampling.guides import Context, End, Layers, Start, away_from, guide
from reverie.sampling.tapping import identity
from reverie.types import Taps


@guide("pag", "perturbed_attention", source="Ahn et al. 2024, section 4")
def make(
    previous: Guidance,
    context: Context,
    *,
    scale: Annotated[float, Field(ge=0, le=100, description="how strongly it pushes")] = 3.0,
    adaptive_scale: Annotated[
        float, Field(ge=0, le=1, description="how much the scale falls with every timestep of the model")
    ] = 0.0,
    layers: Layers = "mid",
    start: Start = 0.0,
    end: End = 1.0,
) -> Guidance:
    """Push away from a picture without structure: named self-attention layers see every place alone."""
    taps = Taps(attention=dict.fromkeys(context.layout.attention_at(layers), identity))

    def falling(sigma: float) -> float:
        """The scale at timestep t, `scale - adaptive_scale * (T - t)` from 0 up (diffusers' PAG pipelines)."""
        return max(scale - adaptive_scale * (context.process.steps - context.process.timestep(sigma)), 0.0)

    return away_from(previous, lambda answers: taps, falling if adaptive_scale else scale, start, end)
