"""Articles and plurals of the names of things."""

from __future__ import annotations

import re
from collections.abc import Collection

NOUN_ENDS = r" (?:with|of|on|in|behind|without|showing|from|tilted|and|at|over|a|pointed|for) "
# What these do is said behind them ("face screaming in fear", "person mountain biking").
DOERS = r"\b(face|person|man|woman|head|index|leaf|bubble|smiley|monkey|hand|chart|page) (?:\w+ )?[\w-]+ing\b"
SINGULAR_STARTS = ("person ", "man ", "woman ", "face ", "smiley ", "monkey ", "construction ")
BARE_STARTS = ("one ", "two ", "rolling ")
IRREGULAR = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "ox": "oxen",
    "tooth": "teeth", "foot": "feet", "goose": "geese", "die": "dice", "leaf": "leaves", "wolf": "wolves",
    "knife": "knives", "loaf": "loaves", "scarf": "scarves", "elf": "elves", "half": "halves", "cactus": "cacti",
    "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes", "volcano": "volcanoes",
    "mosquito": "mosquitoes", "hero": "heroes", "buffalo": "buffaloes", "snowman": "snowmen",
    "superhero": "superheroes", "genius": "geniuses", "merperson": "merpeople", "sheaf": "sheaves",
    "tornado": "tornadoes",
}  # fmt: skip
UNCHANGED = frozenset({"sheep", "deer", "bison", "moose", "shrimp", "squid"})
ENDINGS = ((r"(s|x|z|ch|sh)$", r"\1es"), (r"([^aeiou])y$", r"\1ies"), (r"(?<!hu)man$", "men"))


def noun_part(name: str) -> str:
    """The part of a name that is declined: "glass" of "glass of milk"."""
    doer = re.search(DOERS, name)
    return re.split(NOUN_ENDS, name[: doer.end(1)] if doer else name)[0]


def head_noun(name: str) -> str:
    """The word that decides article and plural: the last one before "with", "of" and the like."""
    return noun_part(name).split(" ")[-1]


def is_plural(name: str, singular_s: Collection[str]) -> bool:
    """True for names such as "grapes", whose head noun ends in s and is not listed as a singular."""
    head = head_noun(name)
    plural = head.endswith("s") and not head.endswith(("ss", "'s")) and head not in singular_s
    return plural and not name.startswith(SINGULAR_STARTS)


def article_kind(name: str, no_article: Collection[str], definite: Collection[str], singular_s: Collection[str]) -> str:
    """Which article a name takes: "a", "the" or none (substances, plurals, proper names, numbers)."""
    if name in definite:
        return "the"
    if name in no_article or name.startswith(BARE_STARTS) or is_plural(name, singular_s):
        return ""
    return "a"


def plural_word(word: str) -> str:
    """The plural of one word."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word in UNCHANGED or word.endswith("fish"):
        return word
    before, hyphen, last = word.rpartition("-")
    if hyphen and last not in {"up", "on", "in", "o", "lantern"}:
        return f"{before}-{plural_word(last)}"
    for ending, many in ENDINGS:
        declined, fits = re.subn(ending, many, word)
        if fits:
            return declined
    return word + "s"


def plural(name: str) -> str:
    """The plural of a name: its head noun is declined, what follows stays ("glasses of milk")."""
    part = noun_part(name)
    before, space, head = part.rpartition(" ")
    return before + space + plural_word(head) + name[len(part) :]
