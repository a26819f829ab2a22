"""A whole evaluation at tiny size: drawing that goes on where it stopped, verdicts, baselines, distances, report."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from reverie.engine.bundle import Model, load
from reverie.engine.metadata.read import read_metadata
from reverie.engine.sources import read_picture
from reverie.errors import RequestError
from reverie.evaluate import scenes as module
from reverie.evaluate.asking import World, open_world
from reverie.evaluate.drawing import claim, draw_missing, place, request_for
from reverie.evaluate.report import markdown, scores_json
from reverie.evaluate.scenes import Evaluation
from reverie.evaluate.scores import shares
from reverie.nets.inception import Inception
from reverie.train.judging import save_judge
from tests.apps import models
from tests.apps.commandline import CommandLine
from tests.evaluate import judged

COUNT = 6


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POOL", 60)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a judge, sprites and what the model was taught."""
    folder = tmp_path_factory.mktemp("evaluation")
    models.folder(folder / "model")
    judged.write_world(folder / "sprites")
    judge = judged.judge()
    save_judge(folder / "judge", judge.config, judge.state_dict())
    judged.diffusion_config(folder / "model.toml", folder / "sprites", hold_out=["colour"])
    return folder


@pytest.fixture(scope="module")
def model(root: Path) -> Model:
    return load(root / "model", device="cpu", precision="float32")


@pytest.fixture
def world(root: Path) -> World:
    return open_world(judged.judge(), None, root / "model.toml")


def truly_drawn(evaluation: Evaluation) -> None:
    """A model that draws just what it is asked for."""
    for group, asked in evaluation.asked.items():
        (evaluation.out / group / "drawn").mkdir(parents=True)
        for n, scene in enumerate(asked):
            Image.fromarray(evaluation.world.drawn([scene])[0]).save(place(evaluation.out / group / "drawn", n))


def test_every_picture_is_drawn_once_by_its_own_prompt_and_seed(model: Model, tmp_path: Path) -> None:
    prompts = ["a red fox", "two owls", "a frog", "a star (outlined)"]
    request = request_for(model, 3, steps=2)
    calls: list[tuple[int, int]] = []
    assert draw_missing(model, request, prompts[:2], tmp_path) == 2
    before = place(tmp_path, 0).read_bytes()
    assert draw_missing(model, request, prompts, tmp_path, lambda *done: calls.append(done)) == 2
    assert calls == [(4, 4)]
    assert place(tmp_path, 0).read_bytes() == before
    assert draw_missing(model, request, prompts, tmp_path) == 0
    for n, prompt in enumerate(prompts):
        found = read_metadata(place(tmp_path, n)).request
        assert (found.prompt, found.seed, found.dialect) == (prompt, n, "plain")
        alone = model.draw(request.model_copy(update={"prompt": prompt, "seed": n, "batch_size": 1})).images[0]
        a, b = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in
                (alone, read_picture(str(place(tmp_path, n)))))  # fmt: skip
        assert int((a - b).abs().max()) <= 1  # alone and in a batch, up to rounding


def test_a_folder_holds_the_pictures_of_one_run(model: Model, tmp_path: Path) -> None:
    request = request_for(model, 2, steps=2)
    claim(tmp_path, model, request, {"seed": 0})
    claim(tmp_path, model, request_for(model, 7, steps=2), {"seed": 0})  # the batch size changes nothing
    with pytest.raises(RequestError, match="pictures of another run: its request differs; choose another --out"):
        claim(tmp_path, model, request_for(model, 2, steps=3), {"seed": 0})
    with pytest.raises(RequestError, match="its seed differs"):
        claim(tmp_path, model, request, {"seed": 1})
    (tmp_path / "run.json").write_text("[", encoding="utf-8")
    with pytest.raises(RequestError, match="does not say what was drawn"):
        claim(tmp_path, model, request, {"seed": 0})


def test_true_pictures_score_as_the_true_pictures(world: World, tmp_path: Path) -> None:
    """A model that draws the truth has the judge's own errors, no more; and it copies nothing."""
    evaluation = Evaluation(world, tmp_path, COUNT)
    truly_drawn(evaluation)
    for group in evaluation.asked:
        evaluation.keep_true(group)
        scored = evaluation.score(group)
        assert scored.drawn == scored.true
        assert scored.drawn.keys() == scored.shuffled.keys() == scored.retrieved.keys()
        verdicts = [json.loads(line) for line in (tmp_path / group / "verdicts.jsonl").read_text().splitlines()]
        assert [v["caption"] for v in verdicts] == [s.caption for s in evaluation.asked[group]]
        assert shares(v["answers"] for v in verdicts) == scored.drawn
        near = evaluation.copies(group)
        assert near["pixels"]["drawn"] == near["pixels"]["true"]
        assert near["features"]["near_right"] == 0


def test_a_copy_is_noticed(world: World, tmp_path: Path) -> None:
    evaluation = Evaluation(world, tmp_path, COUNT)
    truly_drawn(evaluation)
    evaluation.keep_true("colour")
    for n in range(COUNT):
        Image.fromarray(world.drawn([world.taught.scene(n)])[0]).save(place(tmp_path / "colour" / "drawn", n))
    found = evaluation.copies("colour")
    assert found["pixels"]["drawn"] == pytest.approx(0, abs=1e-3)
    assert found["pixels"]["near_right"] == found["features"]["near_right"] == COUNT
    assert found["pixels"]["true"] > 0.05


def test_the_command(cli: CommandLine, root: Path, tmp_path: Path) -> None:
    """Draws, judges, reports; a second run draws only what is new; a report of JSON is the file's."""
    out = tmp_path / "out"
    words = ["evaluate", "scenes", "--model", root / "model", "--judge", root / "judge", "--config",
             root / "model.toml", "--out", out, "--device", "cpu", "--steps", 1, "--batch-size", 4]  # fmt: skip
    first = cli(*words, "--count", 3)
    assert first.code == 0, first.err
    report = json.loads((out / "report.json").read_text())
    assert report["drawing"]["pictures"] == 6
    assert first.out == (out / "report.md").read_text() + "\n"
    assert list(report["scores"]) == list(report["copies"]) == ["seen", "colour"]
    assert report["scores"]["colour"]["drawn"]["all"]["asked"] == 3
    assert "distances" not in report

    torch.manual_seed(0)
    weights = {n: t for n, t in Inception().state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(weights, tmp_path / "inception.safetensors")
    second = cli(*words, "--count", 4, "--inception", tmp_path / "inception.safetensors", "--json")
    assert second.code == 0, second.err
    found = json.loads(second.out)
    assert found == json.loads((out / "report.json").read_text())
    assert found["drawing"]["pictures"] == 2
    assert found["distances"]["seen"]["pictures"] == found["distances"]["held out"]["pictures"] == 4
    gap = found["distances"]["held out"]["fid"] - found["distances"]["seen"]["fid"]
    assert found["distances"]["gap"]["fid"] == pytest.approx(gap)
    assert f"| gap | {gap:.1f} |" in markdown(found)


def test_the_report_says_every_number_that_was_measured(world: World, tmp_path: Path) -> None:
    evaluation = Evaluation(world, tmp_path, COUNT)
    truly_drawn(evaluation)
    for group in evaluation.asked:
        evaluation.keep_true(group)
    scores = scores_json({group: evaluation.score(group) for group in evaluation.asked})
    text = markdown({"scores": scores, "copies": {group: evaluation.copies(group) for group in evaluation.asked}})
    row = next(
        line for line in text.splitlines() if line.startswith("| thing in a colour it was never seen in | colour |")
    )
    drawn = scores["colour"]["drawn"]["colour"]
    assert f"**{100 * drawn['share']:.1f} %** ({100 * drawn['low']:.1f} % to {100 * drawn['high']:.1f} %)" in row
    assert row.endswith(f"| {drawn['asked']} |")
    widths = {line.count("|") for line in text.splitlines()[:4]}
    assert len(widths) == 1


def test_bad_input_is_one_line(cli: CommandLine, root: Path, tmp_path: Path) -> None:
    scenes = ["evaluate", "scenes", "--out", tmp_path / "out", "--judge"]
    assert "no judge in" in cli.refused(*scenes, tmp_path / "nowhere")
    assert "say where the sprites are" in cli.refused(*scenes, root / "judge")
    assert "no configuration file" in cli.refused(*scenes, root / "judge", "--config", tmp_path / "none.toml")
    assert not (tmp_path / "out").exists()


def test_prompts_and_pictures_by_command(cli: CommandLine, model: Model, tmp_path: Path) -> None:
    from tests.evaluate.test_clip_score import whole_clip

    draw_missing(model, request_for(model, 4, steps=1), ["a fox", "an owl", "a frog"], tmp_path / "drawn")
    whole_clip().save_pretrained(tmp_path / "clip")
    ran = cli("evaluate", "prompts", tmp_path / "drawn", "--clip", tmp_path / "clip", "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert [each["prompt"] for each in found["each"]] == ["a fox", "an owl", "a frog"]
    assert found["clip_score"] == pytest.approx(sum(each["clip_score"] for each in found["each"]) / 3)
    Image.new("RGB", (8, 8)).save(tmp_path / "drawn" / "without.png")
    assert "without.png" in cli.refused("evaluate", "prompts", tmp_path / "drawn", "--clip", tmp_path / "clip")
