"""Which emoji become things to draw, and what they are called."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.emoji.english import article_kind, plural
from recipes.emoji.packages import read_json_members
from recipes.emoji.styles import code_key

from reverie.train.scenes.colours import COLOURS, NEUTRALS
from reverie.train.scenes.sprites import Word

WORDS_FILE = Path(__file__).with_name("words.json")
LOCALES = ("de", "fr", "es", "it", "pt", "nl")
COLOUR_WORDS = frozenset({*COLOURS, *NEUTRALS, "grey"})
# Other words of colour, before which no second one can stand.
SHADES = frozenset({"gold", "golden", "silver", "colorful", "colourful", "dark", "light"})


@dataclass(frozen=True)
class Words:
    """The hand-written word lists of words.json."""

    synonyms: Mapping[str, Sequence[str]]
    names: Mapping[str, str]
    bad_codes: frozenset[str]
    symbols: frozenset[str]
    left_out: frozenset[str]
    no_article: frozenset[str]
    definite: frozenset[str]
    singular_s: frozenset[str]
    uncounted: frozenset[str]
    known: tuple[str, ...]


def load_words(path: Path = WORDS_FILE) -> Words:
    """Read words.json."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    synonyms, names, known = raw.pop("synonyms"), raw.pop("names"), tuple(raw.pop("known"))
    lists: dict[str, Any] = {key: frozenset(value) for key, value in raw.items()}
    return Words(synonyms=synonyms, names=names, known=known, **lists)


@dataclass(frozen=True)
class Entry:
    """One emoji as emojibase lists it; `labels` are its names in other languages, {locale: name}."""

    label: str
    hexcode: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    short_codes: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Concept:
    """One thing to draw: its name, code points, group, other names, and its names in other languages."""

    name: str
    hexcode: str
    group: str
    synonyms: tuple[str, ...]
    labels: Mapping[str, str]


# A synonym may stand for this many concepts at most.
MOST_MEANINGS = 3
CONCRETE_GROUPS = frozenset({"animals-nature", "food-drink", "travel-places", "activities", "objects"})
LEFT_OUT_SUBGROUPS = frozenset({"family", "keycap", "alphanum", "zodiac", "gender", "skin-tone", "hair-style"})
LEFT_OUT_GROUPS = frozenset({"flags", "component", ""})
KEPT_GENDERED = frozenset({"mermaid"})
KEPT_CLOCK = "three o'clock"


def plain(text: str) -> str:
    """Lower case with straight quotes: the form of every name and caption."""
    return text.lower().replace("’", "'").replace("“", '"').replace("”", '"')


def natural_name(label: str, words: Words) -> str:
    """Turn a CLDR label into words that a person would type."""
    text = plain(label)
    who, _, what = text.partition("person: ")
    if not who and what:
        return "bald person" if what == "bald" else f"person with {'a ' * (what == 'beard')}{what}"
    return words.names.get(text, text)


def is_kept(entry: Entry, words: Words) -> bool:
    """Decide whether an emoji becomes a picture: see the list in README.md."""
    name = plain(entry.label)
    if entry.group in LEFT_OUT_GROUPS or entry.subgroup in LEFT_OUT_SUBGROUPS or name in words.left_out:
        return False
    if "facing right" in name or name.startswith(("family", "man: ", "woman: ")):
        return False
    if entry.group == "symbols":
        return name in words.symbols
    if entry.subgroup == "time" and name.endswith((" o'clock", "-thirty")):
        return name == KEPT_CLOCK
    return name in KEPT_GENDERED or not is_gender_variant(entry.hexcode)


def is_gender_variant(hexcode: str) -> bool:
    """True for "man X" and "woman X", which always have a neutral "person X" beside them."""
    parts = code_key(hexcode).split("-")
    return len(parts) > 2 and (parts[0] in {"1f468", "1f469"} or parts[-1] in {"2640", "2642"})


def read_entries(archive: Path) -> list[Entry]:
    """Return every emoji of the archive in Unicode's order."""
    locales = {locale: f"package/{locale}/data.json" for locale in LOCALES}
    english, codes, groups = "package/en/data.json", "package/en/shortcodes/emojibase.json", "package/meta/groups.json"
    files = read_json_members(archive, [english, codes, groups, *locales.values()])
    labels = {locale: {raw["hexcode"]: raw["label"] for raw in files[name]} for locale, name in locales.items()}
    meta = files[groups]
    entries = []
    for raw in sorted(files[english], key=lambda raw: (raw.get("order", 0), raw["hexcode"])):
        code = raw["hexcode"]
        found = files[codes].get(code, [])
        entries.append(
            Entry(
                label=raw["label"],
                hexcode=code,
                group=meta["groups"].get(str(raw.get("group")), ""),
                subgroup=meta["subgroups"].get(str(raw.get("subgroup")), ""),
                tags=tuple(plain(tag) for tag in raw.get("tags", [])),
                short_codes=(found,) if isinstance(found, str) else tuple(found),
                labels={locale: plain(names[code]) for locale, names in labels.items() if code in names},
            )
        )
    return entries


def word_lines(entries: Sequence[Entry]) -> list[str]:
    """A line of words for every emoji, drawn or not: more English for the vocabulary."""
    return [", ".join([plain(entry.label), *entry.tags]) for entry in entries if entry.group]


def choose_concepts(entries: Sequence[Entry], words: Words) -> list[Concept]:
    """Turn the entries that are kept into concepts, the best known first.

    Known are those of the list in words.json, in its order; behind them come the others in Unicode's order. A synonym
    is dropped if it means too many things, is another concept's name, or names a colour that the name does not.
    """
    kept = [entry for entry in entries if is_kept(entry, words)]
    spoken = frozenset(re.findall(r"[a-z]+", " ".join(word_lines(entries))))
    taken = frozenset(natural_name(entry.label, words) for entry in kept)
    synonyms = [synonyms_of(entry, spoken, words) for entry in kept]
    uses = Counter(name for names in synonyms for name in names)
    concepts = []
    for entry, names in zip(kept, synonyms, strict=True):
        name = natural_name(entry.label, words)
        others = (other for other in names if other not in taken and uses[other] <= MOST_MEANINGS)
        fitting = tuple(other for other in others if colour_words(other) <= colour_words(name))
        concepts.append(Concept(name, entry.hexcode, entry.group, fitting, entry.labels))
    place = {name: number for number, name in enumerate(words.known)}
    return sorted(concepts, key=lambda concept: place.get(concept.name, len(place)))


def colour_words(name: str) -> frozenset[str]:
    """The colours that a name names."""
    return COLOUR_WORDS & frozenset(re.findall(r"[a-z]+", name))


def bare_names(concepts: Sequence[Concept]) -> dict[str, str]:
    """What things are called when they are painted: {"red apple": "apple"}.

    Where several things would have the same bare name (hearts of all colours), the best known has it; where a thing has
    that name already (cats and black cats), none.
    """
    names = frozenset(concept.name for concept in concepts)
    bare: dict[str, str] = {}
    for concept in concepts:
        first, _, rest = concept.name.partition(" ")
        if (
            first in COLOUR_WORDS
            and rest
            and rest not in names
            and rest not in bare.values()
            and not colour_words(rest)
        ):
            bare[concept.name] = rest
    return bare


def words_of(concept: Concept, bare: Mapping[str, str], words: Words) -> list[Word]:
    """All names of a concept, the main one first."""
    texts = [concept.name, *concept.synonyms]
    if concept.name in bare:
        texts.append(bare[concept.name])
    return [
        make_word(text, concept.name not in bare or text == bare[concept.name], words) for text in dict.fromkeys(texts)
    ]


def make_word(text: str, may_be_plain: bool, words: Words) -> Word:
    """A name with its article and plural."""
    article = article_kind(text, words.no_article, words.definite, words.singular_s)
    counted = article == "a" and text not in words.uncounted and " and " not in text
    coloured = colour_words(text) or SHADES & frozenset(text.split())
    return Word(text, article, plural(text) if counted else None, may_be_plain and not coloured)


def synonyms_of(entry: Entry, known: Collection[str], words: Words) -> list[str]:
    """Hand-written synonyms, and short codes made of ordinary words."""
    names = list(words.synonyms.get(plain(entry.label), []))
    # The short codes of faces, people and signs are chat slang ("lol", "yes"), not names of what is drawn.
    if entry.group in CONCRETE_GROUPS:
        spoken = [code.replace("_", " ") for code in entry.short_codes]
        names += [
            code
            for code in spoken
            if code not in words.bad_codes and len(code) > 2 and all(word in known for word in code.split())
        ]
    return list(dict.fromkeys(names))
