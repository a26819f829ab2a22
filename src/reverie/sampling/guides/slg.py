"""Skip-layer guidance."""

from typing import Annotated

from pydantic import Field

from reverie.sampling.guidance import Guidance
from reverie.sampling.guides import Context, End, Layers, Start, away_from, guide
from reverie.types import Taps


@guide("slg", "skip_layer", source="Stability AI 2024, sd3.5: sd3_impls.py, SkipLayerCFGDenoiser")
def make(
    previous: Guidance,
    context: Context,
    *,
    scale: Annotated[float, Field(ge=0, le=100, description="how strongly it pushes")] = 2.8,
    layers: Layers = "mid",
    start: Start = 0.01,
    end: End = 0.2,
) -> Guidance:
    """Push away from what the network draws without some of its transformer blocks."""
    taps = Taps(bypass=frozenset(context.layout.blocks_at(layers)))
    return away_from(previous, lambda answers: taps, scale, start, end)
