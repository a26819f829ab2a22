"""Pictures composed on the fly: sprites, a grammar of scenes, captions that are true, and what is held out.

`Scenes` is the data set: scene number i of a seed is a function of the two, so nothing has to be kept between steps.
"""

from collections.abc import Iterable

import numpy as np

from reverie.train.scenes.colours import Bytes
from reverie.train.scenes.compose import Composer
from reverie.train.scenes.config import ScenesConfig
from reverie.train.scenes.drawing import draw
from reverie.train.scenes.scene import Scene
from reverie.train.scenes.splits import SPLITS, Split
from reverie.train.scenes.sprites import open_sprites

__all__ = ["SPLITS", "Scene", "Scenes", "ScenesConfig", "Split"]


class Scenes:
    """An endless set of composed pictures.

    Attributes:
        composer: which things, styles and splits there are.
    """

    def __init__(self, config: ScenesConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self.composer = Composer(open_sprites(config.path), config)

    def scene(self, number: int) -> Scene:
        """Scene `number` of those that may be trained on."""
        return self.composer.scene(_generator(self.seed, 0, number))

    def batch(self, numbers: Iterable[int]) -> tuple[Bytes, list[str]]:
        """The pictures `(n, size, size, 3)` uint8 and captions of these scenes."""
        scenes = [self.scene(number) for number in numbers]
        return self.draw(scenes), [scene.caption for scene in scenes]

    def draw(self, scenes: Iterable[Scene], size: int | None = None) -> Bytes:
        """The true pictures of scenes, `(n, size, size, 3)` uint8, at the configured or another size."""
        return np.stack([draw(scene, self.composer.sprites, size or self.config.size) for scene in scenes])

    def held_out(self, split: Split, count: int, seed: int = 0) -> list[Scene]:
        """Scenes that show what `split` withholds, and nothing else that is withheld."""
        stream = 1 + SPLITS.index(split)
        return [self.composer.scene(_generator(seed, stream, number), split) for number in range(count)]

    def splits(self) -> tuple[Split, ...]:
        """What can be asked as withheld: not what an earlier stage of the training has shown all of."""
        return tuple(split for split in SPLITS if split in self.config.hold_out and self.composer.can_ask(split))

    def is_held_out(self, scene: Scene) -> set[Split]:
        """The splits that a scene belongs to; none for what may be trained on."""
        return self.composer.splits.is_held_out(scene)


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream, number])))
