"""The data set as a whole: a function of seed and number, never showing what is withheld, drawing what it says."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from reverie.errors import ConfigError
from reverie.train.scenes import SPLITS, Scenes, ScenesConfig, Split
from reverie.train.scenes.colours import NEUTRALS, distance, named, shares
from reverie.train.scenes.compose import CONTRAST
from reverie.train.scenes.scene import Kind, Place, Scene, Thing

WORLDS: list[dict[str, Any]] = [
    {},
    {"concepts": 5},
    {"styles": ["flat", "3d", "blob"]},
    {"concepts": ["owl", "whale", "fox"]},
]


def scenes(folder: Path, seed: int = 0, **fields: Any) -> Scenes:
    return Scenes(ScenesConfig.model_validate({"path": folder, "size": 32, **fields}), seed)


def test_a_batch_is_a_function_of_seed_and_numbers(folder: Path) -> None:
    pixels, captions = scenes(folder, 3).batch(range(12))
    assert pixels.shape == (12, 32, 32, 3) and pixels.dtype == np.uint8 and len(captions) == 12
    again, said = scenes(folder, 3).batch([7, 2])
    np.testing.assert_array_equal(again, pixels[[7, 2]])
    assert said == [captions[7], captions[2]]
    assert scenes(folder, 4).batch(range(12))[1] != captions


@pytest.mark.parametrize("world", WORLDS)
def test_training_never_shows_what_is_withheld(folder: Path, world: dict[str, Any]) -> None:
    data, everything = scenes(folder, 1, **world), scenes(folder)
    for number in range(1500):
        scene = data.scene(number)
        assert data.is_held_out(scene) == set(), scene
        # Neither in this world nor in any larger one.
        assert everything.is_held_out(scene) == set(), scene


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("world", WORLDS[:2])
def test_held_out_scenes_show_that_and_only_that(folder: Path, world: dict[str, Any], split: Split) -> None:
    data = scenes(folder, **world)
    chosen = data.held_out(split, 60, seed=5)
    assert all(data.is_held_out(scene) == {split} for scene in chosen)
    assert chosen == data.held_out(split, 60, seed=5) != data.held_out(split, 60, seed=6)
    assert len({scene.caption for scene in chosen}) > 10
    assert data.draw(chosen[:3], size=24).shape == (3, 24, 24, 3)


def test_what_was_shown_before_is_not_asked_as_withheld(folder: Path, tmp_path: Path) -> None:
    data = scenes(folder)
    pairs = {(s.things[0].concept, s.things[0].style) for s in data.held_out("style", 60)}
    words = {s.things[0].word for s in data.held_out("word", 60)}
    seen_pair, seen_word = min(pairs), min(words)
    (tmp_path / "shown.json").write_text(json.dumps({"things": [seen_pair], "words": [seen_word]}))
    told = scenes(folder, shown=tmp_path / "shown.json")
    left = {(s.things[0].concept, s.things[0].style) for s in told.held_out("style", 60)}
    assert left and left <= pairs - {seen_pair}
    left_words = {s.things[0].word for s in told.held_out("word", 60)}
    assert left_words and left_words <= words - {seen_word}
    assert [told.scene(n) for n in range(50)] == [data.scene(n) for n in range(50)]  # nor is it trained on


def test_a_split_of_which_all_was_shown_before_is_not_asked(folder: Path, tmp_path: Path) -> None:
    data = scenes(folder)
    everything = [word.text for concept in data.composer.concepts for word in concept.words]
    (tmp_path / "shown.json").write_text(json.dumps({"things": [], "words": everything}))
    told = scenes(folder, shown=tmp_path / "shown.json")
    assert set(data.splits()) == set(SPLITS) and set(told.splits()) == set(SPLITS) - {"word"}
    assert scenes(folder, hold_out=["count"]).splits() == ("count",)


@pytest.mark.parametrize("text", ["[]", "{", '{"things": [["cat"]], "words": []}'])
def test_a_broken_list_of_what_was_shown(folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "shown.json").write_text(text)
    with pytest.raises(ConfigError, match=r"data\.shown: .* is not"):
        scenes(folder, shown=tmp_path / "shown.json")
    with pytest.raises(ConfigError, match=r"data\.shown: cannot read"):
        scenes(folder, shown=tmp_path / "none.json")


def test_further_names_are_asked_and_never_trained(folder: Path, tmp_path: Path) -> None:
    data = scenes(folder)
    everything = [word.text for concept in data.composer.concepts for word in concept.words]
    (tmp_path / "shown.json").write_text(json.dumps({"things": [], "words": everything}))
    (tmp_path / "unseen.json").write_text(json.dumps({"owl": ["hooter", "night bird of prey"]}))
    told = scenes(folder, shown=tmp_path / "shown.json", unseen=tmp_path / "unseen.json", hold_out=[])
    assert told.splits() == () and scenes(folder, unseen=tmp_path / "unseen.json").splits() == SPLITS
    told = scenes(folder, shown=tmp_path / "shown.json", unseen=tmp_path / "unseen.json")
    asked = told.held_out("word", 40)
    assert {scene.things[0].word for scene in asked} == {"hooter", "night bird of prey"}
    assert {scene.things[0].concept for scene in asked} == {"owl"} and "hooter" in " ".join(s.caption for s in asked)
    assert all(told.is_held_out(scene) == {"word"} for scene in asked)
    assert [told.scene(n) for n in range(200)] == [data.scene(n) for n in range(200)]
    free = scenes(folder, unseen=tmp_path / "unseen.json", hold_out=[])
    assert not any("hooter" in free.scene(n).caption for n in range(400))


@pytest.mark.parametrize(
    ("text", "why"),
    [("[]", "is not {name"), ("{", "is not JSON"), ('{"owl": "hooter"}', "is not {name"),
     ('{"owls": ["hooter"]}', "'owls' is not among"), ('{"owl": ["night bird"]}', "'night bird' is a name that is")],
)  # fmt: skip
def test_broken_lists_of_further_names(folder: Path, tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "unseen.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"data\.unseen: .*{re.escape(why)}"):
        scenes(folder, unseen=tmp_path / "unseen.json")


def test_without_hold_out_everything_is_shown(folder: Path) -> None:
    data, strict = scenes(folder, hold_out=[]), scenes(folder)
    shown = set().union(*(strict.is_held_out(data.scene(number)) for number in range(400)))
    assert shown == set(SPLITS)


def test_the_world_is_what_the_configuration_names(folder: Path) -> None:
    data = scenes(folder, concepts=4, styles=["blob", "flat"], mix={"single": 1, "relation": 1})
    things = [thing for number in range(300) for thing in data.scene(number).things]
    assert {thing.concept for thing in things} == {"red apple", "fox", "unicorn", "mouse"}
    assert {thing.style for thing in things} == {"blob", "flat"}
    assert {data.scene(number).kind for number in range(100)} == {"single", "relation"}


def test_the_mix_is_kept(folder: Path) -> None:
    data = scenes(folder, mix={"single": 6, "coloured": 3, "count": 1, "ring": 0})
    kinds: list[Kind] = [data.scene(number).kind for number in range(1000)]
    assert kinds.count("single") / 1000 == pytest.approx(0.6, abs=0.05)
    assert kinds.count("count") / 1000 == pytest.approx(0.1, abs=0.03)
    assert "ring" not in kinds and "relation" not in kinds


def single(thing: Thing, place: Place, background: tuple[str, ...] = ("white",)) -> Scene:
    return Scene("single", (thing,), None, (place,), background, "")


def test_things_are_drawn_where_they_stand(folder: Path) -> None:
    data = scenes(folder)
    (pixels,) = data.draw([single(Thing("fox", "flat", "fox"), Place(0, 0.25, 0.75, 0.5))], size=64)
    ink = (pixels != 255).any(axis=-1)
    assert ink[32:, :32].mean() > 0.6
    assert not ink[:32].any() and not ink[:, 32:].any()


def test_a_scene_is_the_same_at_every_size(folder: Path) -> None:
    data = scenes(folder, 2)
    chosen = [data.scene(number) for number in range(20)]
    large, small = data.draw(chosen, 128), data.draw(chosen, 32)
    reduced = large.reshape(20, 32, 4, 32, 4, 3).mean(axis=(2, 4))
    # Places are rounded to whole pixels, and so edges differ; the rest does not.
    assert np.abs(reduced - small).mean() < 12


def test_painted_things_have_their_colour(folder: Path) -> None:
    data = scenes(folder, mix={"coloured": 1}, foreign=0)
    for number in range(60):
        scene = data.scene(number)
        place = Place(0, 0.5, 0.5, 1.0)
        ground = "black" if scene.things[0].colour != "black" else "white"
        (pixels,) = data.draw([single(scene.things[0], place, (ground,))])
        rgba = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
        covered = {name: share for name, share in shares(rgba).items() if name not in NEUTRALS}
        assert max(covered, key=lambda name: covered[name]) == scene.things[0].colour, scene


def test_a_colour_in_a_name_is_the_drawings(folder: Path) -> None:
    data = scenes(folder, concepts=["red apple"], mix={"single": 1}, foreign=0, synonyms=0, hold_out=[])
    said: dict[bool, set[str]] = {True: set(), False: set()}
    for number in range(200):
        thing = data.scene(number).things[0]
        said[data.composer.sprites.styles[thing.style].ink].add(thing.word)
    assert said == {False: {"red apple"}, True: {"apple"}}  # in black ink an apple is not red


def test_things_stand_out_from_their_ground(folder: Path) -> None:
    data = scenes(folder, plain=0.0, mix={"single": 1}, foreign=0)
    for number in range(200):
        scene = data.scene(number)
        tone = data.composer.sprites.tone_of(scene.things[0].concept, scene.things[0].style)
        for colour in scene.background:
            assert colour == "white" or (colour not in tone.own and distance(named(colour), tone.mean) >= CONTRAST)


def test_a_gradient_runs_from_top_to_bottom(folder: Path) -> None:
    tiny = Place(0, 0.5, 0.5, 0.1)
    (pixels,) = scenes(folder).draw([single(Thing("fox", "flat", "fox"), tiny, ("red", "blue"))])
    assert tuple(pixels[0, 0]) == named("red") and tuple(pixels[-1, -1]) == named("blue")
    assert (np.diff(pixels[:, 0, 2].astype(int)) >= 0).all()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"concepts": ["fox", "dragon"]}, "'dragon' is not among"),
        ({"concepts": 12}, "there are 11 things in 6 or more styles"),
        ({"concepts": 0}, "data.concepts is 0"),
        ({"styles": ["flat", "cubist"]}, "'cubist' is unknown; there are: 3d, flat"),
        ({"mix": {"single": 0}}, "data.mix"),
    ],
)
def test_bad_worlds_are_said(folder: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        scenes(folder, **fields)


def test_a_world_without_such_a_scene_says_so(folder: Path) -> None:
    lonely = scenes(folder, concepts=["fox"], mix={"relation": 1})
    with pytest.raises(ConfigError, match="may be shown"):
        lonely.scene(0)
    with pytest.raises(ConfigError, match="withholds a style"):
        scenes(folder, concepts=["plum"]).held_out("style", 1)


@pytest.mark.parametrize(
    "field", [{"kinds": {}}, {"mix": {"double": 1}}, {"size": 4}, {"plain": 1.5}, {"hold_out": ["all"]}]
)
def test_bad_fields_are_refused(folder: Path, field: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ScenesConfig.model_validate({"path": folder, **field})


def test_broken_folders_are_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="build the sprites first"):
        scenes(tmp_path)
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    bad = tmp_path / "index.json"
    bad.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="not JSON"):
        scenes(tmp_path)
    bad.write_text(json.dumps({**index, "format": 0}), encoding="utf-8")
    with pytest.raises(ConfigError, match="format 1"):
        scenes(tmp_path)
    bad.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot read"):
        scenes(tmp_path)
    np.save(tmp_path / "sprites.npy", np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"expected uint8 \(N, H, W, 4\)"):
        scenes(tmp_path)
    np.save(tmp_path / "sprites.npy", np.zeros((3, 8, 8, 4), np.uint8))
    with pytest.raises(ConfigError, match="has 3 sprites but describes"):
        scenes(tmp_path)
    bad.write_text(json.dumps({**index, "concepts": [{"name": "fox"}]}), encoding="utf-8")
    with pytest.raises(ConfigError, match="no usable 'words'"):
        scenes(tmp_path)
