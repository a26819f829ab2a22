"""What SDXL's U-Net is told beside the noise (Podell et al. 2023, section 2 and figure 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reverie.errors import CheckpointError
from reverie.families.base import Join, Sizes
from reverie.families.encoders import on_channels
from reverie.nets.blocks import timestep_embedding
from reverie.text.embed import Encoding
from reverie.types import Cond


def size_width(vector_width: int, pooled_width: int, *, scored: bool) -> int:
    """Channels in which a U-Net is told each number, from the width of its vector and of the pooled prompt.

    Args:
        scored: the refiner's numbers: an aesthetic score in the place of the target size.

    Raises:
        CheckpointError: the widths leave no whole channels for the numbers.
    """
    count = 5 if scored else 6
    width, rest = divmod(vector_width - pooled_width, count)
    if width < 2 or width % 2 or rest:
        raise CheckpointError(
            f"the U-Net wants a vector of {vector_width}: {pooled_width} of the pooled prompt leave no even share for "
            f"each of {count} numbers; the text encoder is of another model"
        )
    return width


def join(width: int, *, scored: bool) -> Join:
    """The rule: contexts side by side; the pooled prompt and each number as sines and cosines in one vector.

    Args:
        width: see `size_width`.
    """

    def condition(encodings: Sequence[Encoding], sizes: Sizes) -> Cond:
        pooled = encodings[-1].pooled
        assert pooled is not None
        told = timestep_embedding(_numbers(sizes, scored=scored).to(pooled.device), width).flatten()
        vector = torch.cat([pooled, told.to(pooled.dtype).expand(len(pooled), -1)], dim=-1)
        return Cond(on_channels(encodings), vector=vector)

    return condition


def _numbers(sizes: Sizes, *, scored: bool) -> Tensor:
    """Rows before columns, as the model was trained: original size, crop, then target size or score."""
    own = (sizes.width, sizes.height)
    numbers: list[float] = [*(sizes.original or own)[::-1], *sizes.crop[::-1]]
    numbers += [sizes.aesthetic_score] if scored else (sizes.target or own)[::-1]
    return torch.tensor(numbers, dtype=torch.float32)
