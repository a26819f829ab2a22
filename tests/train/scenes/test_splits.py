"""What is withheld: the right share of it, decided by names alone."""

from itertools import product
from pathlib import Path

import pytest

from reverie.train.scenes.colours import COLOURS
from reverie.train.scenes.scene import Scene, Thing
from reverie.train.scenes.splits import STYLES_NEEDED, Split, Splits, fraction, ordered
from reverie.train.scenes.sprites import Sprites, open_sprites

NAMES = [f"thing {n}" for n in range(120)]


@pytest.fixture(scope="module")
def sprites(folder: Path) -> Sprites:
    return open_sprites(folder)


@pytest.fixture(scope="module")
def splits(sprites: Sprites) -> Splits:
    return Splits(sprites)


def test_the_hash_never_changes() -> None:
    """A model's held-out sets must be the same tomorrow: BLAKE2b of the names, 8 bytes, big end first."""
    assert fraction("style", "fox", "flat") == 0.38433711432676804
    assert fraction("a", "b") != fraction("ab") != fraction("b", "a")


def test_one_style_of_things_in_six(sprites: Sprites, splits: Splits) -> None:
    for name, concept in sprites.concepts.items():
        withheld = splits.styles[name]
        assert withheld in concept.sprites if len(concept.sprites) >= STYLES_NEEDED else withheld is None
    assert splits.styles["plum"] is None
    assert len(set(splits.styles.values())) > 3


def test_two_strange_colours(sprites: Sprites, splits: Splits) -> None:
    for name, concept in sprites.concepts.items():
        withheld = splits.colours[name]
        assert len(withheld) == 2 and withheld <= set(COLOURS) - concept.natural
    assert set().union(*splits.colours.values()) > {"blue", "green", "purple"}


@pytest.mark.parametrize("axis", ["horizontal", "vertical", "ring"])
def test_a_fifth_of_ordered_pairs_but_never_both(splits: Splits, axis: str) -> None:
    pairs = [(a, b) for a, b in product(NAMES, NAMES) if a != b]
    withheld = {pair for pair in pairs if splits.order(axis, *pair)}
    assert len(withheld) / len(pairs) == pytest.approx(0.2, abs=0.015)  # three standard deviations of 7,140 pairs
    assert not withheld & {(b, a) for a, b in withheld}
    assert not splits.order(axis, "fox", "fox")


def test_the_axes_withhold_different_pairs(splits: Splits) -> None:
    pairs = list(product(NAMES, NAMES))
    sets = [{pair for pair in pairs if splits.order(axis, *pair)} for axis in ("horizontal", "vertical")]
    assert len(sets[0] & sets[1]) < 0.3 * len(sets[0])


def test_three_of_some_things(splits: Splits) -> None:
    withheld = [name for name in NAMES if splits.count(name, 3)]
    assert 0.15 < len(withheld) / len(NAMES) < 0.45
    assert not any(splits.count(name, count) for name in NAMES for count in (1, 2, 4))


def test_main_names_are_always_trained(sprites: Sprites, splits: Splits) -> None:
    assert not any(splits.word(name) for name in sprites.concepts)
    assert sum(splits.word(name) for name in NAMES) / len(NAMES) == pytest.approx(1 / 7, abs=0.1)
    assert any(splits.word(name, "de") for name in [*sprites.concepts, *NAMES])


def test_the_same_picture_said_from_either_side_is_one_order() -> None:
    assert ordered("left of", "fox", "owl") == ordered("right of", "owl", "fox") == ("horizontal", "fox", "owl")
    assert ordered("and", "fox", "owl") == ("horizontal", "fox", "owl")
    assert ordered("above", "fox", "owl") == ordered("below", "owl", "fox") == ("vertical", "fox", "owl")
    assert ordered("in a ring of", "fox", "owl") == ("ring", "fox", "owl")


def scene(*things: Thing, **fields: object) -> Scene:
    defaults = {"kind": "single", "relation": None, "places": (), "background": ("white",), "caption": ""}
    return Scene(things=things, **{**defaults, **fields})  # type: ignore[arg-type]


def test_is_held_out_names_every_reason(sprites: Sprites, splits: Splits) -> None:
    style = splits.styles["fox"]
    assert style is not None
    seen = next(s for s in sprites.concepts["fox"].sprites if s != style)
    colour = min(splits.colours["fox"])
    assert splits.is_held_out(scene(Thing("fox", seen, "fox"))) == set()
    assert splits.is_held_out(scene(Thing("fox", style, "fox"))) == {"style"}
    assert splits.is_held_out(scene(Thing("fox", seen, "fox", colour))) == {"colour"}
    assert splits.is_held_out(scene(Thing("fox", style, "fox", colour))) == {"style", "colour"}


def test_a_relation_counts_in_the_withheld_order_only(sprites: Sprites, splits: Splits) -> None:
    names = list(sprites.concepts)
    first, second = next(p for p in product(names, names) if splits.order("horizontal", *p))
    style = next(s for s in sprites.styles if s not in {splits.styles[first], splits.styles[second]})
    a, b = Thing(first, style, first), Thing(second, style, second)
    for relation, held in (("left of", True), ("and", True), ("right of", False)):
        found = splits.is_held_out(scene(a, b, kind="relation", relation=relation))
        assert found == ({"relation"} if held else set())
        back = splits.is_held_out(scene(b, a, kind="relation", relation=relation))
        assert back == (set() if held else {"relation"})


@pytest.mark.parametrize("left", ["style", "colour", "relation", "count", "word"])
def test_a_split_can_be_left_out(sprites: Sprites, splits: Splits, left: Split) -> None:
    only = Splits(sprites, [left])
    assert only.styles == (splits.styles if left == "style" else dict.fromkeys(splits.styles))
    assert (only.colours == splits.colours) is (left == "colour")
    assert any(only.order("ring", a, b) for a, b in product(NAMES, NAMES)) is (left == "relation")
    assert any(only.count(name, 3) for name in NAMES) is (left == "count")
    assert any(only.word(name) for name in NAMES) is (left == "word")
