"""Batches of scenes, for processes that do nothing else."""

from dataclasses import dataclass
from functools import cache

from reverie.train.scenes import Scenes, ScenesConfig
from reverie.train.scenes.colours import Bytes


@dataclass(frozen=True)
class Composition:
    """A batch by its number; small to send, it opens the sprites once in every process.

    Attributes:
        seed: of the scenes.
        size: scenes a batch.
    """

    config: ScenesConfig
    seed: int
    size: int

    def __call__(self, number: int) -> tuple[Bytes, list[str]]:
        """Pictures `(size, H, W, 3)` uint8 and captions of batch `number`."""
        return _opened(self.config.model_dump_json(), self.seed).batch(
            range(number * self.size, (number + 1) * self.size)
        )


@cache
def _opened(config: str, seed: int) -> Scenes:
    return Scenes(ScenesConfig.model_validate_json(config), seed)
