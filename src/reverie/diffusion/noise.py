"""Random numbers: one generator per picture, drawn on the CPU, so that a picture depends on its own seed alone."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SeededNoise:
    """Standard normal noise for a batch, row i from a generator of its own seeded with `seeds[i]`.

    Calling it draws the next `(B, *shape)` float32. Row i is the same for any batch size, order or device.
    The stream equals that of a list of CPU generators in diffusers.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.shape = tuple(shape)
        self.device = torch.device(device)
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        """The next `(B, *shape)`."""
        rows = [torch.randn(self.shape, generator=g, dtype=torch.float32) for g in self._generators]
        return torch.stack(rows).to(self.device)
