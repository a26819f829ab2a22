"""The model card: what stands in it is what was measured."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from recipes.emoji import card

from reverie.engine.sources import read_picture
from reverie.evaluate import scenes as module
from reverie.evaluate.asking import open_world
from reverie.evaluate.drawing import place
from reverie.evaluate.report import markdown, scores_json
from reverie.evaluate.scenes import Evaluation
from tests.apps import models
from tests.evaluate import judged

COUNT = 3


@pytest.fixture
def evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished evaluation of a model that draws the truth, as the judge, who knows nothing, sees it."""
    monkeypatch.setattr(module, "POOL", 30)
    sprites, out = judged.write_world(tmp_path / "sprites"), tmp_path / "evaluation"
    config = judged.diffusion_config(tmp_path / "model.toml", sprites, concepts=["fox", "owl"], hold_out=["colour"])
    config.write_text(config.read_text(encoding="utf-8").replace('"out"', f'"{tmp_path}"'), encoding="utf-8")
    world = open_world(judged.judge(), None, config)
    done = Evaluation(world, out, COUNT)
    for group, asked in done.asked.items():
        (out / group / "drawn").mkdir(parents=True)
        for n, scene in enumerate(asked):
            Image.fromarray(world.drawn([scene])[0]).save(place(out / group / "drawn", n))
        done.keep_true(group)
    report = {
        "model": {"hash": "0123456789abcdef"}, "judge": "fedcba9876543210", "scenes_a_group": COUNT,
        "request": {"steps": 7, "sampler": "euler", "guidance_scale": 2.5},
        "data": world.taught.config.model_dump(mode="json", exclude={"path"}),
        "scores": scores_json({group: done.score(group) for group in done.asked}),
        "copies": {group: done.copies(group) for group in done.asked},
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return out


def test_the_card_says_what_was_measured(evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config, docs = models.folder(tmp_path / "model"), tmp_path / "model.toml", tmp_path / "docs"
    docs.mkdir()
    log = [{"step": n, "loss": 1 / n, "seconds": 0.5} for n in range(1, 201)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    words = ["--evaluation", evaluation, "--diffusion", config, "--on", "an abacus", "--model", model, "--docs", docs]
    monkeypatch.setattr(sys, "argv", ["card", *map(str, words)])
    card.main()
    for path in (docs / "model-card.md", model / "README.md"):
        text, report = path.read_text(encoding="utf-8"), json.loads((evaluation / "report.json").read_text())
        assert "{" not in text
        assert markdown(report).strip() in text
        assert "fox, owl; by these names" in text
        assert "| flat | fluent-emoji-flat | Microsoft Corporation | MIT | text encoder and U-Net |" in text
        assert "7 steps of euler, guidance scale 2.5" in text
        loss = sum(1 / n for n in range(101, 201)) / 100
        assert f"| text encoder and U-Net | 200 | 200 | 100 | {loss:.4f} | an abacus |" in text
    assert "model-card.png" in (docs / "model-card.md").read_text(encoding="utf-8")
    assert read_picture(str(docs / "model-card.png")).width > COUNT * card.SHOWN


def test_parameters_are_counted(tmp_path: Path) -> None:
    text = card.architecture(models.folder(tmp_path / "model"))
    modules = models.networks(len(models.LETTERS) * 2 + 2)
    for part, module_ in zip(("text_encoder", "unet", "vae"), modules, strict=True):
        count = sum(parameter.numel() for parameter in module_.parameters())
        assert f"| `{part}` | {count / 1e6:.1f} M |" in text


def test_best_and_worst() -> None:
    def verdict(thing: str, right: bool) -> card.Verdict:
        return card.Verdict("seen", 0, thing, (thing,), "", (right,), right)

    given = [verdict("fox", n < 9) for n in range(10)] + [verdict("owl", n < 1) for n in range(5)]
    given += [verdict("rare", True)] * (card.OFTEN - 1)
    best, worst = card.extremes(given)
    assert best == "fox (90 % of 10), owl (20 % of 5)"
    assert worst == "owl (20 % of 5), fox (90 % of 10)"


def test_what_is_weak_is_said() -> None:
    def scores(**shares: float) -> dict[str, object]:
        return {"drawn": {name: {"share": share} for name, share in shares.items()}}

    given = {
        "seen": scores(all=0.6, object=0.1),
        "relation": scores(relation=0.07, all=0.9),
        "word": scores(object=0.49),
    }
    assert (
        card.weak(given) == "two things never seen in this order (relation 7 %), name that was never used (object 49 %)"
    )
    assert card.weak({"seen": scores(all=0.5)}) == "nothing"
