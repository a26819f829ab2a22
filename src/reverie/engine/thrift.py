"""The fields of a request that do less work than the exact picture needs."""

from typing import Literal

from pydantic import Field

from reverie.engine.fields import Fields

Fast = Literal["0", "1", "2", "3", "auto"]


class Cache(Fields):
    """Feature caching: on some evaluations most of the network is not run, and what it said last stands for it.

    U-Nets: DeepCache (Ma et al. 2023). Diffusion transformers: first-block cache (ParaAttention, after TeaCache, Liu et
    al. 2024).
    """

    interval: int | None = Field(
        None, ge=1, le=100, description="U-Nets: one evaluation in so many is whole; 3 if absent, 1 is off"
    )
    branch: int | None = Field(
        None,
        ge=0,
        le=100,
        description="U-Nets: the way down is run to this map, 0 the first, on the others; 0 if absent",
    )
    schedule: Literal["uniform", "quadratic"] | None = Field(
        None, description="U-Nets: evenly, or more often away from `centre` (DeepCache, section 3.3); uniform if absent"
    )
    centre: float = Field(0.3, ge=0, le=1, description="for quadratic: share of the evaluations where few are whole")
    power: float = Field(1.4, ge=1, le=4, description="for quadratic: how uneven, 1 not at all")
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="SD 3: change of the first block below which the others are not run; 0.1 if absent, 0 is off",
    )


class Merging(Fields):
    """Token merging: self-attention sees fewer tokens (Bolya & Hoffman 2023). U-Nets."""

    ratio: float = Field(0.5, ge=0, lt=1, description="share of the tokens that is merged away; 0 is off")
    stride: int = Field(2, ge=2, le=8, description="side of the squares of which one token is merged into")
    levels: int = Field(1, ge=1, le=8, description="of the network that have attention, the largest maps first")
    random: bool = Field(False, description="another token of each square at every evaluation, instead of the first")
