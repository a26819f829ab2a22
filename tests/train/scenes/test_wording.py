"""Captions say what is there, all of it, and nothing else."""

import re
from collections import Counter
from pathlib import Path

import pytest

from reverie.train.scenes import Scene, Scenes, ScenesConfig
from reverie.train.scenes.colours import COLOURS
from reverie.train.scenes.scene import Thing
from reverie.train.scenes.wording import NUMBERS, RELATIONS, SIZES, indefinite, may_have_size, word_of

COUNT = 1500


@pytest.fixture(scope="module")
def scenes(folder: Path) -> Scenes:
    return Scenes(ScenesConfig(path=folder, foreign=0.2), seed=11)


@pytest.fixture(scope="module")
def many(scenes: Scenes) -> list[Scene]:
    return [scenes.scene(number) for number in range(COUNT)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fox", "a fox"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("unamused face", "an unamused face"),
        ("hourglass", "an hourglass"),
        ("honeybee", "a honeybee"),
        ("x-ray", "an x-ray"),
        ("ufo", "a ufo"),
        ("orange fox", "an orange fox"),
        ("3d owl", "a 3d owl"),
    ],
)
def test_articles(text: str, expected: str) -> None:
    assert indefinite(text) == expected


def name_of(thing: Thing, scene: Scene, scenes: Scenes, number: int) -> str:
    if scene.language != "en":
        return thing.word
    word = word_of(thing, scenes.composer.sprites)
    many = thing.count > 1 or (scene.kind == "ring" and number == 1)
    return str(word.plural) if many else word.text


def without_names(scene: Scene, scenes: Scenes) -> str:
    """The caption less the names of things, which may contain words of colour."""
    text = scene.caption
    for number, thing in enumerate(scene.things):
        text = text.replace(name_of(thing, scene, scenes, number), "#", 1)
    return text


def test_every_kind_comes(many: list[Scene]) -> None:
    assert {scene.kind for scene in many} == {"single", "coloured", "count", "relation", "ring"}
    assert {scene.relation for scene in many} == {None, *RELATIONS}


def test_things_are_named_and_counted(scenes: Scenes, many: list[Scene]) -> None:
    for scene in (scene for scene in many if scene.language == "en"):
        for number, thing in enumerate(scene.things):
            assert re.search(rf"\b{name_of(thing, scene, scenes, number)}\b", scene.caption), scene
        if scene.kind == "count":
            assert len(scene.places) == scene.things[0].count
            assert any(f"{said} " in scene.caption for said in NUMBERS[scene.things[0].count])


def test_colours_are_said_where_things_or_ground_have_them_and_nowhere_else(scenes: Scenes, many: list[Scene]) -> None:
    for scene in (scene for scene in many if scene.language == "en"):
        shown = Counter(thing.colour for thing in scene.things if thing.colour)
        shown.update(colour for colour in scene.background if colour in COLOURS)
        words = re.findall(r"[a-z]+", without_names(scene, scenes))
        assert Counter(word for word in words if word in COLOURS) == shown, scene


def test_style_is_said_unless_it_is_the_first(scenes: Scenes, many: list[Scene]) -> None:
    first = scenes.composer.styles[0]
    for scene in many:
        style = scene.things[0].style
        assert {thing.style for thing in scene.things} == {style}
        said = [other for other in scenes.composer.styles if re.search(rf"\b{other}\b", without_names(scene, scenes))]
        assert said == [style] or (style == first and said == [])
    silent = [scene for scene in many if scene.things[0].style == first and first not in scene.caption]
    assert len(silent) / sum(scene.things[0].style == first for scene in many) == pytest.approx(0.5, abs=0.1)


def test_size_is_said_if_it_is_unusual(scenes: Scenes, many: list[Scene]) -> None:
    words = {word: size for size, words in SIZES.items() for word in words}
    for scene in (scene for scene in many if scene.language == "en"):
        said = {words[word] for word in re.findall(r"[a-z]+", without_names(scene, scenes)) if word in words}
        assert said == {thing.size for thing in scene.things if thing.size}
    assert may_have_size("airplane") and not may_have_size("small airplane")


def test_the_first_thing_stands_in_the_relation_to_the_second(scenes: Scenes, many: list[Scene]) -> None:
    for scene in (scene for scene in many if scene.relation is not None):
        first, second = (name_of(thing, scene, scenes, n) for n, thing in enumerate(scene.things))
        between = re.search(rf"\b{first}\b(.*?)\b{second}\b", scene.caption)
        assert between is not None, scene
        assert scene.relation is not None
        said = between[1]
        assert any(f" {way} " in said for way in RELATIONS[scene.relation]) or (scene.relation == "and" and "," in said)


def test_white_needs_no_words_other_grounds_are_always_said(scenes: Scenes, many: list[Scene]) -> None:
    for scene in (scene for scene in many if scene.background != ("white",)):
        text = without_names(scene, scenes)
        assert all(re.search(rf"\b{colour}\b", text) for colour in scene.background)
        assert ("gradient background" in text) is (len(scene.background) == 2)
    plain = [scene for scene in many if scene.background == ("white",)]
    assert 0 < sum("white" in scene.caption for scene in plain) < 0.3 * len(plain)


def test_articles_and_blanks_are_right(many: list[Scene]) -> None:
    for scene in many:
        assert not re.search(r"\ba [aeio]|\ban [^aeiouhx]|  | ,|,,|^[ ,]|[ ,]$", scene.caption), scene.caption


def test_other_languages_name_single_things(scenes: Scenes, many: list[Scene]) -> None:
    foreign = [scene for scene in many if scene.language != "en"]
    assert {scene.language for scene in foreign} == {"de", "fr"}
    for scene in foreign:
        (thing,) = scene.things
        assert thing.word == scenes.composer.sprites.concepts[thing.concept].labels[scene.language]
        assert scene.caption.startswith(thing.word) and scene.background == ("white",) and thing.colour is None


def test_there_are_many_ways_to_say_it(many: list[Scene]) -> None:
    assert len({scene.caption for scene in many}) > 0.8 * len(many)
