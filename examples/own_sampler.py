"""A sampler is a function of `denoise`: write one, register it, and everything can use it by name."""

import sys
from pathlib import Path

from torch import Tensor

import reverie
from reverie.diffusion.process import Process
from reverie.sampling.registry import sampler
from reverie.sampling.steps import pairs
from reverie.types import Denoise, Noise


@sampler("midpoint", order=2, source="the explicit midpoint rule", evaluations=lambda n: 2 * n)
def midpoint(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise, process: Process) -> Tensor:
    """Take the slope from the middle of the step."""
    for sigma, down in pairs(sigmas):
        middle = (sigma + down) / 2
        half = x + (middle - sigma) * (x - denoise(x, sigma)) / sigma
        x = x + (down - sigma) * (half - denoise(half, middle)) / middle
    return x


def main(out: Path) -> None:
    result = reverie.load().generate("a rocket", seed=3, steps=10, sampler="midpoint", spacing="karras")
    result.images[0].save(out)
    print(out)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "rocket.png"))
