"""Scenes by chance: which things, how many, where, in which colours, on which ground, and in which words."""

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

from numpy.random import Generator

from reverie.errors import ConfigError
from reverie.train.scenes import layout
from reverie.train.scenes.colours import COLOURS, distance, named
from reverie.train.scenes.config import ScenesConfig
from reverie.train.scenes.scene import Kind, Relation, Scene, Size, Thing
from reverie.train.scenes.shown import Shown, also_called, read_unseen
from reverie.train.scenes.splits import COUNT_WITHHELD, STYLES_NEEDED, Split, Splits, ordered
from reverie.train.scenes.sprites import Concept, Sprites, Word
from reverie.train.scenes.wording import Wording, chance, may_have_size, pick

T = TypeVar("T")

# The least difference between things and ground, and between things and white that white is used at its usual share.
CONTRAST, ON_WHITE = 0.25, 0.12
GROUNDS = (*COLOURS, "gray", "black")
PAIRED: tuple[Relation, ...] = ("and", "left of", "right of", "above", "below")
# How often: a thing among others is painted, a ground is a gradient, a size is said.
PAINTED, GRADIENT, SIZED = 0.25, 0.15, 0.2
TRIES = 10_000

# Which kinds of scene can show what is withheld.
KINDS_OF: dict[Split, tuple[Kind, ...]] = {
    "style": ("single", "coloured", "count", "relation"),
    "colour": ("coloured",),
    "relation": ("relation", "ring"),
    "count": ("count",),
    "word": ("single",),
}


def choose_concepts(sprites: Sprites, wanted: int | list[str] | None) -> list[Concept]:
    """The things of a world.

    Raises:
        ConfigError: a name that is not there, or more things than there are.
    """
    if wanted is None:
        return list(sprites.concepts.values())
    if isinstance(wanted, list):
        unknown = [name for name in wanted if name not in sprites.concepts]
        if unknown:
            raise ConfigError(f"data.concepts: {unknown[0]!r} is not among the {len(sprites.concepts)} sprites' names")
        return [sprites.concepts[name] for name in wanted]
    drawn = [concept for concept in sprites.concepts.values() if len(concept.sprites) >= STYLES_NEEDED]
    if not 1 <= wanted <= len(drawn):
        raise ConfigError(f"data.concepts is {wanted}; there are {len(drawn)} things in {STYLES_NEEDED} or more styles")
    return drawn[:wanted]


class Composer:
    """Makes scenes of the things and styles that a configuration names."""

    def __init__(self, sprites: Sprites, config: ScenesConfig) -> None:
        unseen = read_unseen(config.unseen, sprites) if config.unseen else {}
        sprites = also_called(sprites, unseen)
        self.sprites, self.config = sprites, config
        self.splits = Splits(sprites, config.hold_out, {word.text for words in unseen.values() for word in words})
        self.shown = Shown() if config.shown is None else Shown.read(config.shown)
        self.concepts = choose_concepts(sprites, config.concepts)
        self.styles = config.styles or list(sprites.styles)
        unknown = [style for style in self.styles if style not in sprites.styles]
        if unknown:
            raise ConfigError(f"data.styles: {unknown[0]!r} is unknown; there are: {', '.join(sprites.styles)}")
        if sum(config.mix.values()) <= 0:
            raise ConfigError("data.mix gives no kind of scene any weight")
        self._wording = Wording(sprites, self.styles[0], config.unnamed, config.keywords)
        self._pools: dict[tuple[str, Kind, Split | None], list[Concept]] = {}

    def scene(self, g: Generator, split: Split | None = None) -> Scene:
        """A scene that may be trained on, or one that shows something withheld in just one way.

        Raises:
            ConfigError: this world has no such scene.
        """
        for _ in range(TRIES):
            kind = self._kind(g, split)
            style = self._style(g, kind, split)
            scene = self._compose(g, kind, style, split) if style else None
            if scene is not None:
                return replace(scene, caption=self._wording.caption(scene, g))
        raise ConfigError(
            f"no scene of these concepts and styles {f'withholds a {split}' if split else 'may be shown'}"
        )

    def can_ask(self, split: Split) -> bool:
        """Whether some thing of this world can be shown in a way that is withheld."""
        return any(self._pool(style, kind, split) for style in self.styles for kind in KINDS_OF[split])

    def _kind(self, g: Generator, split: Split | None) -> Kind:
        kinds = [kind for kind in self.config.mix if split is None or kind in KINDS_OF[split]]
        if not kinds and split is not None:
            return pick(g, KINDS_OF[split])
        return _weighted(g, kinds, [self.config.mix[kind] for kind in kinds])

    def _style(self, g: Generator, kind: Kind, split: Split | None) -> str | None:
        styles = [style for style in self.styles if self._pool(style, kind, split)]
        if self.styles[0] in styles and chance(g, self.config.first_style):
            return self.styles[0]
        return pick(g, styles) if styles else None

    def _pool(self, style: str, kind: Kind, split: Split | None) -> list[Concept]:
        """Who can be the subject of such a scene."""
        key = style, kind, split
        if key not in self._pools:
            self._pools[key] = [concept for concept in self.concepts if self._fits(concept, style, kind, split)]
        return self._pools[key]

    def _fits(self, concept: Concept, style: str, kind: Kind, split: Split | None) -> bool:
        withheld = self.splits.styles[concept.name] == style
        if style not in concept.sprites or withheld is not (split == "style"):
            return False
        if split == "style" and (concept.name, style) in self.shown.things:
            return False
        checks: dict[Kind | Split, Callable[[], bool]] = {
            "coloured": lambda: self._paintable(concept, style),
            "count": lambda: bool(self._words(concept, style, counted=True)),
            "colour": lambda: bool(self._colours(concept, style, "colour")),
            "word": lambda: bool(self._withheld_words(concept, style)),
        }
        if not self._words(concept, style):
            return False
        if split == "count" and not self.splits.count(concept.name, COUNT_WITHHELD):
            return False
        return all(checks[need]() for need in {kind, split} if need in checks and need is not None)

    def _paintable(self, concept: Concept, style: str) -> bool:
        """Whether it can be said in a trained way to have a colour that it can take."""
        return bool(self._colours(concept, style, None)) and bool(self._words(concept, style, plain=True))

    def _words(self, concept: Concept, style: str, *, plain: bool = False, counted: bool = False) -> list[str]:
        """The names that may be used; the main one is the first if it is among them."""
        fitting = (word for word in concept.words if (word.plain or not plain) and (word.plural or not counted))
        trained = (word for word in fitting if not self.splits.word(word.text))
        return [word.text for word in trained if self._true_of(word, concept, style)]

    def _withheld_words(self, concept: Concept, style: str) -> list[str]:
        asked = (word for word in concept.words if word.text not in self.shown.words)
        withheld = (word for word in asked if self.splits.word(word.text))
        return [word.text for word in withheld if self._true_of(word, concept, style)]

    def _true_of(self, word: Word, concept: Concept, style: str) -> bool:
        """Whether a drawing has the colour that its name names: no heart is red in black ink, nor in every style."""
        first = word.text.split(maxsplit=1)[0]
        if first in self.sprites.tone_of(concept.name, style).own:
            return True
        return word.plain if self.sprites.styles[style].ink else first not in COLOURS

    def _compose(self, g: Generator, kind: Kind, style: str, split: Split | None) -> Scene | None:
        subject = pick(g, self._pool(style, kind, split))
        if kind in {"relation", "ring"}:
            return self._two(g, kind, style, subject, split)
        if split == "word":
            first = Thing(subject.name, style, pick(g, self._withheld_words(subject, style)))
        else:
            first = self._thing(g, kind, style, subject, split)
        scatter = self.config.scatter
        several = first.count > 1
        places = layout.several(g, first.count, scatter) if several else layout.single(g, first.size, scatter)
        scene = Scene(kind, (first,), None, places, ("white",), "")
        foreign = self._foreign(g, scene, subject) if kind == "single" and split is None else None
        return foreign or replace(scene, background=self._ground(g, scene))

    def _thing(self, g: Generator, kind: Kind, style: str, concept: Concept, split: Split | None) -> Thing:
        colour = pick(g, self._colours(concept, style, split)) if kind == "coloured" else None
        if kind == "count":
            counts = [n for n in (1, 2, 3, 4) if not self.splits.count(concept.name, n)]
            count = COUNT_WITHHELD if split == "count" else _weighted(g, counts, [1 if n == 1 else 3 for n in counts])
            return self._maybe_painted(g, Thing(concept.name, style, "", None, count), counted=True)
        word = self._word(g, concept, style, plain=colour is not None)
        size: Size | None = pick(g, ("small", "large")) if chance(g, SIZED) and may_have_size(word) else None
        return Thing(concept.name, style, word, colour, 1, size)

    def _maybe_painted(self, g: Generator, thing: Thing, *, counted: bool) -> Thing:
        """Give a thing among others its name, and at times a colour."""
        concept = self.sprites.concepts[thing.concept]
        plain_words = self._words(concept, thing.style, plain=True, counted=counted)
        if chance(g, PAINTED) and plain_words and self._paintable(concept, thing.style):
            word = self._word(g, concept, thing.style, plain=True, counted=counted)
            return replace(thing, colour=pick(g, self._colours(concept, thing.style, None)), word=word)
        return replace(thing, word=self._word(g, concept, thing.style, counted=counted))

    def _word(self, g: Generator, concept: Concept, style: str, *, plain: bool = False, counted: bool = False) -> str:
        words = self._words(concept, style, plain=plain, counted=counted)
        return pick(g, words[1:]) if len(words) > 1 and chance(g, self.config.synonyms) else words[0]

    def _colours(self, concept: Concept, style: str, split: Split | None) -> list[str]:
        """What it can be painted in: what may be trained on, or for the split `colour` what may not."""
        withheld = self.splits.colours[concept.name]
        paints = self.sprites.tone_of(concept.name, style).paints
        return [colour for colour in paints if (colour in withheld) is (split == "colour")]

    def _two(self, g: Generator, kind: Kind, style: str, subject: Concept, split: Split | None) -> Scene | None:
        """Two things in a relation; None if the drawn pair is not what is asked for."""
        other = pick(g, self._pool(style, "count" if kind == "ring" else kind, None) or [subject])
        if other is subject:
            return None
        relation: Relation = "in a ring of" if kind == "ring" else pick(g, PAIRED)
        pair = [self._maybe_painted(g, Thing(c.name, style, ""), counted=False) for c in (subject, other)]
        if kind == "ring":
            pair[1] = self._maybe_painted(g, Thing(other.name, style, ""), counted=True)
        if self.splits.order(*ordered(relation, pair[0].concept, pair[1].concept)) is not (split == "relation"):
            return None
        scatter = self.config.scatter
        places = layout.ring(g, scatter) if kind == "ring" else layout.pair(g, relation, scatter)
        scene = Scene(kind, tuple(pair), relation, places, ("white",), "")
        return replace(scene, background=self._ground(g, scene))

    def _foreign(self, g: Generator, scene: Scene, concept: Concept) -> Scene | None:
        """At times the same scene named in another language."""
        if not chance(g, self.config.foreign):
            return None
        allowed = [lang for lang in self.config.languages if lang in concept.labels]
        allowed = [language for language in allowed if not self.splits.word(concept.labels[language], language)]
        if not allowed:
            return None
        language = pick(g, allowed)
        thing = replace(scene.things[0], word=concept.labels[language], size=None)
        return replace(scene, things=(thing,), places=layout.single(g, None, self.config.scatter), language=language)

    def _ground(self, g: Generator, scene: Scene) -> tuple[str, ...]:
        """White, or another ground that everything stands out from."""
        means = [self._mean(thing) for thing in scene.things]
        pale = min(distance(mean, named("white")) for mean in means) < ON_WHITE
        if chance(g, self.config.plain * (0.5 if pale else 1)):
            return ("white",)
        own = {c for t in scene.things for c in self._own(t)}
        grounds = [c for c in GROUNDS if c not in own and min(distance(m, named(c)) for m in means) >= CONTRAST]
        if not grounds:
            return ("white",)
        first = pick(g, grounds)
        second = pick(g, [*grounds, "white"])
        return (first, second) if first != second and chance(g, GRADIENT) else (first,)

    def _mean(self, thing: Thing) -> tuple[int, int, int]:
        if thing.colour is not None:
            return named(thing.colour)
        return self.sprites.tone_of(thing.concept, thing.style).mean

    def _own(self, thing: Thing) -> Sequence[str]:
        return [thing.colour] if thing.colour else self.sprites.tone_of(thing.concept, thing.style).own


def _weighted(g: Generator, choices: Sequence[T], weights: Sequence[float]) -> T:
    """One of them, in proportion to its weight."""
    sums = list(accumulate(weights))
    return choices[bisect(sums, float(g.random()) * sums[-1], hi=len(choices) - 1)]
