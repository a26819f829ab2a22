"""Ways to do with less memory, and the limits that make them needed."""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, TypeAlias

from reverie.errors import RequestError

Works: TypeAlias = dict[Hashable, Any]
"""What is known of networks from rehearsals before: their twins, and work by network and shapes."""
TILES = (512, 256)  # pixels of the VAE's tiles, the cheaper first
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Measures:
    """What is done to need less memory. The default is nothing.

    Attributes:
        batch: pictures drawn at once at most; None for as many as the request says.
        tile: pixels of the tiles that the VAE works in; None for one piece.
        offload: one part of the model at a time has memory of its own; the others stay in their files.
        packed: packed weights are unpacked at every use, not once.
        blocks: of the networks that are made of blocks, one block after the other gets memory of its own.
        slices: queries that an attention layer looks at at a time; None for all.
    """

    batch: int | None = None
    tile: int | None = None
    offload: bool = False
    packed: bool = False
    blocks: bool = False
    slices: int | None = None

    def words(self) -> tuple[str, ...]:
        """Each of them, in words."""
        return (
            *([] if self.batch is None else [f"{self.batch} picture{'s' * (self.batch > 1)} at a time"]),
            *([] if self.tile is None else [f"VAE in tiles of {self.tile} pixels"]),
            *(["one part of the model at a time"] if self.offload else []),
            *(["packed weights stay packed"] if self.packed else []),
            *(["networks block by block"] if self.blocks else []),
            *([] if self.slices is None else [f"attention {self.slices} queries at a time"]),
        )


def parse_size(text: str | int) -> int:
    """Bytes: `6G`, `800M`, `1.5GiB`; units are powers of 1024.

    Raises:
        RequestError: nothing of that kind, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", str(text).upper())
    size = round(float(found[1]) * UNITS[found[2]]) if found else 0
    if size <= 0:
        raise RequestError(f"memory is {str(text)!r}; expected a size such as 6G or 800M")
    return size


def shown(size: float) -> str:
    """Bytes in words: `5.9 GiB`, `310 MiB`, `12 KiB`."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
