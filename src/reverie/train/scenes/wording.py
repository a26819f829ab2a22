"""Captions: one scene said in many ways, all of them true."""

from collections.abc import Sequence
from typing import TypeVar

from numpy.random import Generator

from reverie.train.scenes.scene import Relation, Scene, Thing
from reverie.train.scenes.sprites import Sprites, Word

T = TypeVar("T")

AN_EXCEPTIONS = ("hour", "x-ray", "x mark", "suv")  # begin with the sound of a vowel
A_EXCEPTIONS = ("uni", "ufo", "euro", "ewe", "one-")  # begin with the letter but not the sound

NUMBERS = {1: ("one", "a single", "1"), 2: ("two", "two", "2"), 3: ("three", "three", "3"), 4: ("four", "four", "4")}
SIZES = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}
RELATIONS: dict[Relation, tuple[str, ...]] = {
    "and": ("and", "next to", "beside", "with"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "in a ring of": ("inside a ring of", "in a ring of", "in a circle of", "surrounded by"),
}
PICTURES = ("picture", "drawing", "emoji", "icon", "illustration")
# How often: a lead ("a picture of"), the style as an adjective, white said.
LEAD, ADJECTIVE, WHITE = 0.15, 0.3, 0.12


def pick(g: Generator, choices: Sequence[T]) -> T:
    """One of them, each as likely."""
    return choices[int(g.integers(len(choices)))]


def chance(g: Generator, share: float) -> bool:
    """True in this share of cases."""
    return float(g.random()) < share


def indefinite(text: str) -> str:
    """Put "a" or "an" before it, as it sounds."""
    vowel = text[0] in "aeiou" and not text.startswith(A_EXCEPTIONS)
    return f"an {text}" if vowel or text.startswith(AN_EXCEPTIONS) else f"a {text}"


def may_have_size(name: str) -> bool:
    """Whether a word of size can stand before a name: not before "small airplane"."""
    return not any(size in name.split() for sizes in SIZES.values() for size in sizes)


def word_of(thing: Thing, sprites: Sprites) -> Word:
    """The name that a thing goes by."""
    return next(word for word in sprites.concepts[thing.concept].words if word.text == thing.word)


class Wording:
    """Words for scenes made of these sprites.

    Attributes:
        first_style: the style that may go unnamed, in this share `unnamed` of its captions.
        keywords: share of captions that are lists of key words.
    """

    def __init__(self, sprites: Sprites, first_style: str, unnamed: float, keywords: float) -> None:
        self._sprites, self._first_style = sprites, first_style
        self._unnamed, self._keywords = unnamed, keywords

    def caption(self, scene: Scene, g: Generator) -> str:
        """Say what a scene shows."""
        style = scene.things[0].style
        named = style != self._first_style or not chance(g, self._unnamed)
        if scene.language != "en":
            return f"{scene.things[0].word}, {style}" if named else scene.things[0].word
        if chance(g, self._keywords):
            return self._list(scene, style if named else None, g)
        return self._sentence(scene, style if named else None, g)

    def _sentence(self, scene: Scene, style: str | None, g: Generator) -> str:
        alone = scene.relation is None
        before = style is not None and alone and self._sprites.styles[style].adjective and chance(g, ADJECTIVE)
        phrases = [self._phrase(t, n, scene, style if before else None, g) for n, t in enumerate(scene.things)]
        text = phrases[0] if scene.relation is None else f" {pick(g, RELATIONS[scene.relation])} ".join(phrases)
        rest = None if before else style
        if chance(g, LEAD):
            here = rest is not None and chance(g, 0.5)
            text = indefinite(f"{rest} {pick(g, PICTURES)}" if here else pick(g, PICTURES)) + f" of {text}"
            rest = None if here else rest
        return text + _tail(rest, scene.background, g)

    def _list(self, scene: Scene, style: str | None, g: Generator) -> str:
        """Key words: no articles, the properties of a single thing in any order."""
        if scene.relation is not None:
            phrases = [self._bare(thing, n, scene, g) for n, thing in enumerate(scene.things)]
            sign = ", " if scene.relation == "and" else f" {pick(g, RELATIONS[scene.relation])} "
            parts, head = [], sign.join(phrases)
        else:
            thing = scene.things[0]
            apart = thing.colour is not None and thing.count == 1 and chance(g, 0.5)
            head = self._bare(thing, 0, scene, g, with_colour=not apart)
            parts = [thing.colour] if apart and thing.colour else []
        parts += [pick(g, (style, f"{style} style"))] if style else []
        if scene.background != ("white",) or chance(g, WHITE):
            parts.append(_background(scene.background))
        order = [int(n) for n in g.permutation(len(parts))]
        return ", ".join([head, *(parts[n] for n in order)])

    def _phrase(self, thing: Thing, number: int, scene: Scene, style: str | None, g: Generator) -> str:
        """ "a big flat blue fox", "three foxes" """
        word = word_of(thing, self._sprites)
        adjectives = _adjectives(thing, style, g)
        if scene.kind == "ring" and number == 1:
            return " ".join([*adjectives, str(word.plural)])
        if scene.kind == "count":
            name = word.text if thing.count == 1 else str(word.plural)
            return " ".join([pick(g, NUMBERS[thing.count]), *adjectives, name])
        text = " ".join([*adjectives, word.text])
        if word.article == "the" and not adjectives:
            return f"the {text}"
        return indefinite(text) if word.article else text

    def _bare(self, thing: Thing, number: int, scene: Scene, g: Generator, *, with_colour: bool = True) -> str:
        word = word_of(thing, self._sprites)
        many = thing.count > 1 or (scene.kind == "ring" and number == 1)
        counted = [pick(g, NUMBERS[thing.count])] if scene.kind == "count" else []
        colour = [thing.colour] if thing.colour and with_colour else []
        size = [pick(g, SIZES[thing.size])] if thing.size else []
        return " ".join([*counted, *size, *colour, str(word.plural) if many else word.text])


def _adjectives(thing: Thing, style: str | None, g: Generator) -> list[str]:
    size = pick(g, SIZES[thing.size]) if thing.size else None
    return [adjective for adjective in (size, style, thing.colour) if adjective]


def _background(colours: tuple[str, ...]) -> str:
    return f"{colours[0]} background" if len(colours) == 1 else f"{colours[0]} to {colours[1]} gradient background"


def _tail(style: str | None, background: tuple[str, ...], g: Generator) -> str:
    """Style and background at the end of a sentence, both after commas or neither."""
    ground = _background(background) if background != ("white",) or chance(g, WHITE) else None
    if chance(g, 0.5):
        parts = [part for part in (f"{style} style" if style else None, ground) if part]
        if style and chance(g, 0.4):
            parts[0] = style
        if len(parts) == 2 and chance(g, 0.5):
            parts.reverse()
        return "".join(f", {part}" for part in parts)
    said = f" in {indefinite(style)} style" if style and chance(g, 0.3) else f" in {style} style" if style else ""
    if ground is None:
        return said
    if len(background) == 1 and chance(g, 0.2):
        return f"{said} on {background[0]}"
    return f"{said} {pick(g, ('on', 'with', 'against'))} {indefinite(ground)}"
