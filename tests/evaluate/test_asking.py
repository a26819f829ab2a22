"""What a model is asked for, and the baselines that need no model."""

from pathlib import Path

import pytest

from reverie.errors import ConfigError, RequestError
from reverie.evaluate.asking import moved_on, nearest_captions, open_world, words_of
from reverie.train.scenes import SPLITS
from tests.evaluate import judged


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged.write_world(tmp_path_factory.mktemp("sprites"))


def test_all_that_the_judge_knows(sprites: Path) -> None:
    world = open_world(judged.judge(), sprites, None)
    assert world.groups == ("seen", *SPLITS)
    assert all(not world.fresh.is_held_out(scene) for scene in world.asked("seen", 20))
    for split in SPLITS:
        assert all(world.fresh.is_held_out(scene) == {split} for scene in world.asked(split, 10))
        assert world.asked(split, 10)[:4] == world.asked(split, 4)
    assert world.drawn(world.asked("seen", 2)).shape == (2, 32, 32, 3)


def test_scenes_are_not_those_of_training(sprites: Path) -> None:
    worlds = [open_world(judged.judge(), sprites, None, seed) for seed in (0, 1)]
    captions = [[s.caption for s in w.asked("seen", 30)] for w in worlds]
    captions.append([worlds[0].taught.scene(n).caption for n in range(30)])
    assert captions[0] != captions[1] != captions[2] != captions[0]


def test_what_a_model_was_taught(sprites: Path, tmp_path: Path) -> None:
    config = judged.diffusion_config(tmp_path / "model.toml", sprites, concepts=["fox", "owl"], hold_out=["style"])
    world = open_world(judged.judge(), None, config)
    assert world.groups == ("seen", "style")
    assert {t.concept for s in world.asked("seen", 30) for t in s.things} == {"fox", "owl"}


def test_what_cannot_be_asked(sprites: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="say where the sprites are"):
        open_world(judged.judge(), None, None)
    with pytest.raises(ConfigError, match="build the sprites first"):
        open_world(judged.judge(), tmp_path / "nowhere", None)
    config = judged.diffusion_config(tmp_path / "model.toml", sprites, concepts=["fox", "plum"])
    with pytest.raises(RequestError, match="the judge does not know 'plum'"):
        open_world(judged.judge(concepts=("fox", "owl")), None, config)
    text = config.read_text(encoding="utf-8")
    data = text[text.index("[data]") : text.index("[loop]")]
    config.write_text(text.replace(data, '[data]\nfolder = "pictures"\n'), encoding="utf-8")
    with pytest.raises(RequestError, match="trains on a folder of pictures"):
        open_world(judged.judge(), sprites, config)


def test_the_nearest_caption() -> None:
    pool = ["a red apple", "a blue fox", "two foxes, flat", "a fox and a house", "a house"]
    asked = ["the blue fox!", "a house with a fox", "two apples, flat", "a red house"]
    found = [pool[n] for n in nearest_captions(asked, pool)]
    assert found == ["a blue fox", "a fox and a house", "two foxes, flat", "a house"]
    assert nearest_captions(["xyz"], pool) == [0]
    assert words_of("An x-ray, 3D!") == {"an", "x-ray", "3d"}


@pytest.mark.parametrize("count", [2, 3, 10, 11])
def test_nothing_stays_in_its_place(count: int) -> None:
    order = moved_on(count)
    assert sorted(order) == list(range(count))
    assert all(a != b for a, b in enumerate(order))
