"""Classifier-free guidance: its scale over the run."""

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from reverie.sampling.guidance import Guidance
from reverie.sampling.guides import Context, End, Start, guide


@guide("classifier_free", "cfg", "interval", source="Ho & Salimans 2022, equation 6; Kynkäänniemi et al. 2024")
def make(
    previous: Guidance,
    context: Context,
    *,
    scale: Annotated[float | None, Field(ge=0, le=100, description="instead of guidance_scale")] = None,
    curve: Annotated[str | None, Field(description="instead of guidance_curve")] = None,
    floor: Annotated[
        float | None, Field(ge=0, le=100, description="the scale where the curve is 0; 1 if absent")
    ] = None,
    start: Annotated[Start | None, Field(description="instead of guidance_start")] = None,
    end: Annotated[End | None, Field(description="instead of guidance_end")] = None,
    sigma_low: Annotated[float | None, Field(ge=0, description="no guidance at this noise level and below")] = None,
    sigma_high: Annotated[float | None, Field(ge=0, description="no guidance above this noise level")] = None,
) -> Guidance:
    """Change the guidance scale: its curve over the steps, its interval in steps or noise levels.

    It holds for the whole run, wherever it stands among the guides.
    """
    given: dict[str, Any] = {
        "scale": scale, "curve": curve, "floor": floor, "start": start, "end": end, "sigma_low": sigma_low,
        "sigma_high": sigma_high,
    }  # fmt: skip
    chosen = {name: value for name, value in given.items() if value is not None}
    return replace(previous, weight=replace(previous.weight, **chosen))
