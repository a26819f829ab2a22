"""The judge's training: what it is to say, what is done to pictures, whole runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reverie.errors import CheckpointError, ConfigError
from reverie.families.folder import save_part
from reverie.nets.autoencoder import Autoencoder, AutoencoderConfig
from reverie.nets.judge import NO_COLOUR, Maps, Names
from reverie.train.config import JudgeRun
from reverie.train.data import generator
from reverie.train.judging import JudgeMethod, Labels, Truth, finding_loss, labels, naming_loss, open_judge, said
from reverie.train.loop import Trainer
from reverie.train.scenes.colours import COLOURS
from reverie.train.scenes.scene import Place, Scene, Thing
from reverie.train.scenes.sprites import open_sprites
from tests.evaluate import judged
from tests.train import toy
from tests.train.scenes.world import STYLES, THINGS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged.write_world(tmp_path_factory.mktemp("sprites"))


def run(sprites: Path, out: Path, data: dict[str, Any] | None = None, **settings: Any) -> JudgeRun:
    scenes = {"kind": "scenes", "path": sprites, "size": 32, "hold_out": [], "concepts": ["fox", "owl", "frog"],
              "styles": ["flat", "retro"], "foreign": 0.0}  # fmt: skip
    return JudgeRun.model_validate(
        {
            "data": scenes | (data or {}),
            "loop": toy.loop(out),
            "model": {"finder": (8, 8, 8), "namer": (8, 8, 8), "hidden": 16},
        } | settings
    )  # fmt: skip


def trained(run: JudgeRun, until: int | None = None) -> Trainer:
    torch.manual_seed(torch.seed())  # a new process has another state of the global generator
    trainer = Trainer(JudgeMethod(run, CPU), run.loop)
    trainer.run(toy.silent, until)
    return trainer


def scene(*places: Place) -> Scene:
    things = (Thing("fox", "flat", "fox", "blue"), Thing("frog", "retro", "frog"))
    return Scene("relation", things, "and", places, ("white",), "a blue fox and a frog")


def wanted(sprites: Path) -> Labels:
    truth = Truth(open_sprites(sprites), list(THINGS), STYLES)
    empty = scene(Place(1, 0.9, 0.1, 0.2))
    return labels([scene(Place(0, 0.25, 0.5, 0.5), Place(1, 0.8, 0.5, 0.3)), empty], truth, 32)


def test_labels_say_what_is_where(sprites: Path) -> None:
    found = wanted(sprites)
    at = {tuple(place) for place in (found.centre == 1).nonzero().tolist()}
    assert at == {(0, 4, 2), (0, 4, 6), (1, 0, 7)}  # rows and columns of 8 cells
    assert found.rows.tolist() == [0, 0, 1]
    assert [list(THINGS)[n] for n in found.concept] == ["fox", "frog", "frog"]
    assert [STYLES[n] for n in found.style] == ["flat", "retro", "retro"]
    colours = [NO_COLOUR, *COLOURS]
    assert [{colours[n] for n in pair} for pair in found.colour.tolist()] == [{"blue"}, *[{NO_COLOUR, "green"}] * 2]
    torch.testing.assert_close(found.weight.sum((1, 2)), torch.tensor([2.0, 1.0]))
    assert found.side[0, 4, 2] == pytest.approx(np.log(0.5))
    assert found.offset[0, :, 4, 6].tolist() == pytest.approx([0.8 * 8 - 6.5, -0.5])


def test_the_finders_loss_by_loops(sprites: Path) -> None:
    labels, g = wanted(sprites), torch.Generator().manual_seed(0)
    maps = Maps(*(torch.randn(s, generator=g) for s in ((2, 8, 8), (2, 8, 8), (2, 2, 8, 8))))
    focal = side = offset = 0.0
    for n, i, j in np.ndindex(2, 8, 8):
        p, y, weight = (float(t[n, i, j]) for t in (maps.centre.sigmoid(), labels.centre, labels.weight))
        focal -= (1 - p) ** 2 * np.log(p) if y == 1 else (1 - y) ** 4 * p**2 * np.log(1 - p)
        side += weight * abs(float(maps.side[n, i, j] - labels.side[n, i, j]))
        offset += weight * float((maps.offset[n, :, i, j] - labels.offset[n, :, i, j]).abs().sum())
    found = finding_loss(maps, labels)
    assert {k: float(v) for k, v in found.items()} == pytest.approx(
        {"centre": focal / 3, "side": side / 3, "offset": offset / 3}, rel=1e-5
    )


def test_either_colour_is_right(sprites: Path) -> None:
    """For a green frog `its own` and `green` cost nothing, and neither does any mixture of them."""
    labels = wanted(sprites)

    def cost(colours: list[int]) -> float:
        said = torch.full((3, 9), -30.0)
        said[0, 1 + list(COLOURS).index("blue")] = 30
        said[1:, colours] = 30
        return float(naming_loss(Names(torch.zeros(3, 12), torch.zeros(3, 7), said), labels)["colour"])

    green = 1 + list(COLOURS).index("green")
    assert cost([0]) == cost([green]) == cost([0, green]) == pytest.approx(0, abs=1e-5)
    assert cost([2]) > 10


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    torch.manual_seed(0)
    network = Autoencoder(AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, groups=4))
    save_part(folder, "vae", network.config, network.state_dict())
    return folder


def test_blemishes_are_a_function_of_the_step(sprites: Path, vae: Path, tmp_path: Path) -> None:
    method = JudgeMethod(run(sprites, tmp_path, autoencoder=vae), CPU)
    pixels, _ = method.batches(0)
    one, again, other = (method.blemisher(pixels, generator(1, 1, step)) for step in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.shape == pixels.shape
    assert float(one.abs().max()) <= 1


def test_a_batch_too_small_for_any_to_be_encoded(sprites: Path, vae: Path, tmp_path: Path) -> None:
    method = JudgeMethod(run(sprites, tmp_path, autoencoder=vae), CPU)
    pixels = method.batches(0)[0][:1]
    assert round(method.blemisher.how.encode * len(pixels)) == 0 < method.blemisher.how.encode
    assert method.blemisher(pixels, generator(1)).shape == pixels.shape


def test_no_blemishes_change_nothing(sprites: Path, vae: Path, tmp_path: Path) -> None:
    none = dict.fromkeys(("bend", "soften", "tint", "noise", "encode"), 0)
    method = JudgeMethod(run(sprites, tmp_path, blemishes=none, autoencoder=vae), CPU)
    pixels, _ = method.batches(0)
    torch.testing.assert_close(method.blemisher(pixels, generator(1)), pixels, rtol=0, atol=1e-5)


def test_stopping_and_going_on_changes_no_bit(sprites: Path, vae: Path, tmp_path: Path) -> None:
    whole = trained(run(sprites, tmp_path / "whole", autoencoder=vae))
    trained(run(sprites, tmp_path / "halves", autoencoder=vae), until=4)
    halves = trained(run(sprites, tmp_path / "halves", autoencoder=vae))
    a, b = toy.state(whole), toy.state(halves)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert toy.log(whole) == toy.log(halves)


def test_it_learns_to_name_and_to_find(sprites: Path, tmp_path: Path) -> None:
    settings = {"steps": 150, "batch": 16, "learning_rate": 1e-2, "ema": 0.9}
    data = {"concepts": ["fox", "frog"], "mix": {"single": 1.0, "relation": 1.0}}
    trainer = trained(run(sprites, tmp_path / "out", data, loop=toy.loop(tmp_path / "out", **settings)))
    judge, method = open_judge(tmp_path / "out" / "export"), trainer.method
    assert isinstance(method, JudgeMethod)
    scenes = [method.scenes.scene(10_000 + n) for n in range(60)]
    pixels = torch.from_numpy(method.scenes.draw(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1
    seen = judge(pixels)
    named = [[judge.config.concepts[int(one.concept.argmax())] for one in found] for found in seen]
    as_many = sum(len(found) == len(scene.places) for found, scene in zip(seen, scenes, strict=True))
    right = sum(set(n) == {t.concept for t in scene.things} for n, scene in zip(named, scenes, strict=True))
    assert as_many > 45
    assert right > 45  # by chance about 15


def test_export_opens_and_a_sheet_is_drawn(sprites: Path, tmp_path: Path) -> None:
    trainer = trained(run(sprites, tmp_path / "out", loop=toy.loop(tmp_path / "out", sample_every=8)))
    judge = open_judge(tmp_path / "out" / "export")
    assert judge.config.concepts == ("fox", "owl", "frog")
    assert judge.config.styles == ("flat", "retro")
    assert judge.config.colours == (NO_COLOUR, *COLOURS)
    assert all(torch.equal(judge.state_dict()[name], t) for name, t in trainer.ema.shadow.items())
    assert (tmp_path / "out" / "samples" / "0000008.png").exists()


def test_what_is_seen_in_words(sprites: Path) -> None:
    judge = judged.judge()
    assert said(judge.config, []) == "nothing"
    one = next(found[0] for found in judge(_noise(judge)) if found)
    number = int(one.concept.argmax())
    text = said(judge.config, [one, one])
    assert judge.config.concepts[number] in text
    assert text.startswith("2 x ")


def _noise(judge: Any) -> Tensor:
    with torch.no_grad():
        judge.finder.head.bias[0] = 3.0
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"size": 40}}, "data.size is 40; the judge takes multiples of 16"),
        ({"model": {"namer": [8, 12, 8]}}, r"model.namer \[8, 12, 8\]: expected multiples of 8"),
    ],
)
def test_shapes_that_cannot_be(sprites: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JudgeMethod(run(sprites, tmp_path, **settings), CPU)


def test_what_is_no_judge(sprites: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no judge in .*`reverie train judge` makes one"):
        open_judge(tmp_path / "nowhere")
    trained(run(sprites, tmp_path / "out", loop=toy.loop(tmp_path / "out", steps=1)))
    path = tmp_path / "out" / "export" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "finder"}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not the configuration of a judge"):
        open_judge(path.parent)
    path.write_text(json.dumps(config | {"concepts": ["fox"]}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"does not fit: .*wrongly shaped"):
        open_judge(path.parent)
