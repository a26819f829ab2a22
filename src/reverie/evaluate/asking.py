"""What a model is asked to draw, so that it can be judged: seen kinds of scenes, and every kind that was held out."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reverie.errors import RequestError
from reverie.nets.judge import Judge
from reverie.train.config import DiffusionRun, read_config
from reverie.train.judging import Truth
from reverie.train.scenes import SPLITS, Scene, Scenes, ScenesConfig
from reverie.train.scenes.colours import Bytes

SEEN = "seen"
FRESH = 7919  # added to the seed of training: scenes of the kinds that were trained on, but other ones
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class World:
    """What the model was taught, and who judges it.

    Attributes:
        taught: the scenes of training, in their order.
        fresh: others of the same kinds.
        groups: `seen`, and what was held out.
    """

    judge: Judge
    taught: Scenes
    fresh: Scenes
    truth: Truth
    groups: tuple[str, ...]

    def asked(self, group: str, count: int) -> list[Scene]:
        """The first scenes of a group; more of them begin with the same."""
        if group == SEEN:
            return [self.fresh.scene(number) for number in range(count)]
        split = next(split for split in SPLITS if split == group)
        return self.fresh.held_out(split, count, self.fresh.seed)

    def drawn(self, scenes: Sequence[Scene]) -> Bytes:
        """Their true pictures, of the size that the judge knows: `(n, size, size, 3)` uint8."""
        return self.fresh.draw(scenes, self.judge.config.size)


def open_world(judge: Judge, sprites: Path | None, config: Path | None, seed: int = 0) -> World:
    """What a model that was trained on composed scenes is asked for.

    Args:
        sprites: their folder; as in the configuration if None.
        config: what the model was trained by; if None, all that the judge knows, in the usual mixture.
        seed: of the scenes, beside the one of training.

    Raises:
        RequestError: neither of both, or training on something else than scenes.
        ConfigError: a configuration or folder that cannot be used.
    """
    taught_by = read_config(DiffusionRun, config) if config else None
    data = taught_by.data if taught_by else _all_of(judge, sprites)
    if not isinstance(data, ScenesConfig):
        raise RequestError(f"{config} trains on a folder of pictures; only composed scenes are known well enough")
    if sprites is not None:
        data = data.model_copy(update={"path": sprites})
    taught_seed = taught_by.loop.seed if taught_by else 0
    taught, fresh = Scenes(data, taught_seed), Scenes(data, taught_seed + FRESH * (seed + 1))
    composer, known = taught.composer, judge.config
    strange = [c.name for c in composer.concepts if c.name not in known.concepts]
    strange += [style for style in composer.styles if style not in known.styles]
    if strange:
        raise RequestError(f"the judge does not know {strange[0]!r}, which is among what the model was taught")
    truth = Truth(composer.sprites, known.concepts, known.styles)
    return World(judge, taught, fresh, truth, (SEEN, *taught.splits()))


def _all_of(judge: Judge, sprites: Path | None) -> ScenesConfig:
    if sprites is None:
        raise RequestError("say where the sprites are, with --sprites or by a training configuration with --config")
    known = judge.config
    return ScenesConfig(path=sprites, size=known.size, concepts=list(known.concepts), styles=list(known.styles))


def words_of(caption: str) -> set[str]:
    """The words of a caption."""
    return set(re.findall(r"[\w-]+", caption.lower()))


def nearest_captions(asked: Sequence[str], pool: Sequence[str]) -> list[int]:
    """For each caption the one of the pool that shares most words with it; the first of several.

    The measure is weighted Jaccard similarity: the weight of the words that two captions share, in parts of the weight
    of all their words. A word weighs the logarithm of how rare it is in the pool, so that "fox" says more than "a".
    """
    rarity = Counter(word for caption in pool for word in words_of(caption))
    rarity.update(dict.fromkeys({word for caption in asked for word in words_of(caption)}, 0))
    order = {word: n for n, word in enumerate(rarity)}
    weights = np.array([math.log((1 + len(pool)) / (1 + rarity[word])) for word in order], np.float32)
    a, b = (_bags(captions, order) for captions in (asked, pool))
    shared = (a * weights) @ b.T
    either = (a @ weights)[:, None] + (b @ weights)[None] - shared
    return [int(n) for n in (shared / np.maximum(either, 1e-6)).argmax(axis=1)]


def _bags(captions: Sequence[str], order: dict[str, int]) -> Floats:
    bags = np.zeros((len(captions), len(order)), np.float32)
    for row, caption in enumerate(captions):
        bags[row, [order[word] for word in words_of(caption)]] = 1
    return bags


def moved_on(count: int) -> list[int]:
    """An order in which nothing stays in its place: the captions of other pictures."""
    return [(n + max(count // 2, 1)) % count for n in range(count)]
