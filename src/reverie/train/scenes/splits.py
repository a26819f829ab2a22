"""What is never trained on, so that it can be asked afterwards.

Every decision is a hash of names alone: it does not depend on a seed or on the chosen subset, so what a small world
withholds a larger one withholds too, and a model that goes on from one to the other has still not seen it.

    style     one style of each thing that has at least six
    colour    two colours of each thing, none that it has by itself
    relation  a fifth of all ordered pairs in a relation; the opposite order stays
    count     three of a thing, for three things in ten
    word      a seventh of the synonyms, whatever they stand for; in other languages, of the names
"""

import hashlib
from collections.abc import Collection, Iterator
from typing import Literal, get_args

from reverie.train.scenes.colours import COLOURS
from reverie.train.scenes.scene import Relation, Scene
from reverie.train.scenes.sprites import Concept, Sprites

Split = Literal["style", "colour", "relation", "count", "word"]
SPLITS: tuple[Split, ...] = get_args(Split)

STYLES_NEEDED = 6
COLOURS_WITHHELD = 2
COUNT_WITHHELD = 3
# Of the unordered pairs twice as many, each in one of its orders.
RELATION_SHARE, COUNT_SHARE, WORD_SHARE = 0.2, 0.3, 1 / 7


def fraction(*names: str) -> float:
    """A number in [0, 1) that depends on the names alone."""
    digest = hashlib.blake2b("\x1f".join(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class Splits:
    """What is withheld, for the things of a folder of sprites.

    Args:
        unseen: names that are withheld beside those that the hash chooses.
    """

    def __init__(
        self, sprites: Sprites, withheld: Collection[Split] = SPLITS, unseen: Collection[str] = frozenset()
    ) -> None:
        self._withheld, self._unseen = frozenset(withheld), frozenset(unseen)
        self.styles = {c.name: self._style(c) for c in sprites.concepts.values()}
        self.colours = {c.name: self._colours(c) for c in sprites.concepts.values()}
        # The main name of one thing may be a synonym of another; it is always trained.
        self._main = frozenset(c.words[0].text for c in sprites.concepts.values())

    def _style(self, concept: Concept) -> str | None:
        if "style" not in self._withheld or len(concept.sprites) < STYLES_NEEDED:
            return None
        return min(concept.sprites, key=lambda style: fraction("style", concept.name, style))

    def _colours(self, concept: Concept) -> frozenset[str]:
        if "colour" not in self._withheld:
            return frozenset()
        strange = (colour for colour in COLOURS if colour not in concept.natural)
        order = sorted(strange, key=lambda colour: fraction("colour", concept.name, colour))
        return frozenset(order[:COLOURS_WITHHELD])

    def order(self, axis: str, first: str, second: str) -> bool:
        """Whether `first` may not stand before `second` on an axis: left of, above, inside a ring of."""
        if "relation" not in self._withheld or first == second:
            return False
        low, high = sorted((first, second))
        number = fraction("relation", axis, low, high)
        return number < RELATION_SHARE if first == low else RELATION_SHARE <= number < 2 * RELATION_SHARE

    def count(self, concept: str, count: int) -> bool:
        """Whether so many of a thing are never shown."""
        return "count" in self._withheld and count == COUNT_WITHHELD and fraction("count", concept) < COUNT_SHARE

    def word(self, text: str, language: str = "en") -> bool:
        """Whether a name is never used."""
        if language == "en" and text in self._unseen:
            return True
        if "word" not in self._withheld or (language == "en" and text in self._main):
            return False
        return fraction("word", language, text) < WORD_SHARE

    def is_held_out(self, scene: Scene) -> set[Split]:
        """The splits that a scene belongs to; the empty set for one that may be trained on."""
        return set(self._reasons(scene))

    def _reasons(self, scene: Scene) -> Iterator[Split]:
        for thing in scene.things:
            if thing.style == self.styles[thing.concept]:
                yield "style"
            if thing.colour in self.colours[thing.concept]:
                yield "colour"
            if self.count(thing.concept, thing.count):
                yield "count"
            if self.word(thing.word, scene.language):
                yield "word"
        if scene.relation is not None and self.order(*ordered(scene.relation, *(t.concept for t in scene.things))):
            yield "relation"


def ordered(relation: Relation, first: str, second: str) -> tuple[str, str, str]:
    """The same arrangement in its one form: (axis, who is left or above or inside, who is not)."""
    if relation == "in a ring of":
        return "ring", first, second
    axis = "vertical" if relation in {"above", "below"} else "horizontal"
    return (axis, second, first) if relation in {"right of", "below"} else (axis, first, second)
