"""What a run tells about itself."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reverie.train.journal import Journal
from tests.train import toy


def events(folder: Path) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars("loss")]


def test_tensorboard_has_what_the_log_has(tmp_path: Path) -> None:
    with Journal(tmp_path, 0, tensorboard=True) as journal:
        for step in (1, 2, 3):
            journal.step(step, {"loss": 1 / step})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert events(tmp_path / "events") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_steps_that_are_taken_again_are_forgotten(tmp_path: Path) -> None:
    with Journal(tmp_path, 0, tensorboard=True) as journal:
        for step in (1, 2, 3):
            journal.step(step, {"loss": 9.0})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the process died here
    with Journal(tmp_path, 2, tensorboard=True) as journal:
        journal.step(3, {"loss": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 9.0), (2, 9.0), (3, 1.0)]
    assert events(tmp_path / "events") == [(1, 9.0), (2, 9.0), (3, 1.0)]


@pytest.mark.parametrize("kind", ["autoencoder", "diffusion"])
def test_sheets_of_samples(tmp_path: Path, kind: str) -> None:
    run = toy.autoencoder_run(tmp_path, sample_every=4)
    toy.trained(run)
    if kind == "diffusion":
        toy.trained(toy.diffusion_run(tmp_path, tmp_path / "vae" / "export" / "vae", sample_every=4))
    folder = tmp_path / ("vae" if kind == "autoencoder" else "model") / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["0000004.png", "0000008.png"]
