"""Levels of `fast`, tuning, the tiny decoder: what they set, what is remembered, what is refused."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import reverie
from reverie.engine import tiny, tuning
from reverie.engine.bundle import Model
from reverie.engine.levels import LEVELS
from reverie.engine.metadata import a1111_read
from reverie.engine.metadata.read import read_metadata
from reverie.engine.preview import TinyPreview
from reverie.engine.request import Request
from reverie.engine.resolve import resolve
from reverie.errors import ConfigError, RequestError
from reverie.nets.taesd import TAESD, TinyDecoder, numbered
from tests.apps import models

WORDS: dict[str, Any] = {"steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.folder(tmp_path_factory.mktemp("tuning") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return reverie.load(folder, device="cpu", precision="float32")


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own for settings and hashes."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "config" / "reverie" / "fast.json"


def decoder(folder: Path) -> Path:
    """A tiny decoder with random weights, where A1111 and ComfyUI keep theirs."""
    torch.manual_seed(0)
    network = TinyDecoder(TAESD)
    path = folder / "models" / "vae_approx" / "taesd_decoder.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(numbered(network.layers.state_dict(prefix="layers."), "decoder"), path)
    return path


# Levels


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_its_switches(model: Model, level: str) -> None:
    """The resolved request says each of them and no level, so that it draws the same wherever it is drawn again."""
    full = resolve(model, Request.of(prompt="a", fast=level, steps=8, seed=7))
    assert full.fast is None
    meant = LEVELS[level].unet
    assert full.cache is None or full.cache.model_dump().items() >= meant["cache"].items()
    assert (full.cache is None) == ("cache" not in meant)
    assert (full.token_merging is None) == ("token_merging" not in meant)
    assert full.decoder == "full"  # there is no tiny one
    assert resolve(model, full) == full


def test_levels_are_ordered_and_numbers_are_names() -> None:
    assert list(LEVELS) == ["0", "1", "2", "3"]
    assert Request.of(fast=2).fast == "2"


def test_few_steps_keep_no_features_by_a_level(model: Model) -> None:
    """Distilled models have four; who wants it nevertheless says so."""
    assert resolve(model, Request.of(prompt="a", fast=3, steps=4)).cache is None
    assert resolve(model, Request.of(prompt="a", fast=3, steps=4, cache={"interval": 2})).cache is not None


def test_what_the_request_says_wins(model: Model) -> None:
    full = resolve(model, Request.of(prompt="a", fast=3, cache={"interval": 1}, token_merging={"ratio": 0.0}, **WORDS))
    assert full.cache is not None and full.cache.interval == 1
    assert full.token_merging is not None and full.token_merging.ratio == 0


def test_a_picture_says_its_switches_and_is_drawn_again(model: Model, tmp_path: Path) -> None:
    result = model.generate("a red apple", fast=3, steps=8, seed=7)
    result.images[0].save(tmp_path / "a.png")
    found = read_metadata(tmp_path / "a.png")
    assert found.request.cache == result.request.cache
    assert found.request.token_merging == result.request.token_merging
    assert torch.equal(model.draw(found.request).pixels, result.pixels)
    with Image.open(tmp_path / "a.png") as image:
        assert "Token merging ratio: 0.5" in image.info["parameters"]
        assert '"interval": 5' in image.info["parameters"].replace("\\", "")


@pytest.mark.parametrize(("said", "ratio"), [(", Token merging ratio: 0.4", 0.4), ("", None)])
def test_token_merging_in_a_picture_of_a1111(said: str, ratio: float | None) -> None:
    found = a1111_read.read(f"a cat\nSteps: 20, Sampler: Euler a, Seed: 1{said}, Version: v1.9.4").request
    assert (None if found.token_merging is None else found.token_merging.ratio) == ratio


# The tiny decoder


def test_the_tiny_decoder_of_the_library(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = decoder(tmp_path)
    assert tiny.found(model) is None
    monkeypatch.setenv("REVERIE_MODELS", str(tmp_path))
    assert tiny.found(model) == path
    drawn = model.generate("a red apple", decoder="tiny", **WORDS)
    expected = TinyPreview(path, 4)(drawn.latents).permute(0, 2, 3, 1)
    assert torch.equal(drawn.pixels, expected)
    exact = model.generate("a red apple", **WORDS)
    assert torch.equal(drawn.latents, exact.latents)
    assert not torch.equal(drawn.pixels, exact.pixels)
    assert drawn.model["decoder: taesd_decoder"] and not any("decoder" in name for name in exact.model)
    named = model.generate("a red apple", decoder=str(path), **WORDS)
    assert torch.equal(named.pixels, drawn.pixels)
    assert resolve(model, Request.of(prompt="a", fast=3, **WORDS)).decoder == "tiny"


def test_tiny_pictures_that_join_at_their_edges(model: Model, tmp_path: Path) -> None:
    """Rolled latents are rolled pictures."""
    path = decoder(tmp_path)
    request = Request.of(decoder=str(path), seamless="both")
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    rolled = tiny.decode(model, latents.roll(1, -1), request)
    assert torch.allclose(rolled, tiny.decode(model, latents, request).roll(8, -1), atol=1e-5)


# Budgets


@pytest.mark.parametrize(
    ("text", "measure", "limit"),
    [
        ("psnr=35", "psnr", 35),
        ("35", "psnr", 35),
        ("0.95", "ssim", 0.95),
        ("SSIM = 0.9", "ssim", 0.9),
        ("lpips=0.05", "lpips", 0.05),
    ],
)
def test_budgets_as_they_are_written(text: str, measure: str, limit: float) -> None:
    assert tuning.Budget.of(text) == tuning.Budget(measure, limit)


@pytest.mark.parametrize("text", ["", "much", "psnr=", "mse=3", "psnr=-1", "psnr=nan", "ssim=1000"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"expected psnr=35, ssim=0\.95 or lpips=0.05"):
        tuning.Budget.of(text)


def measured(name: str, speed: float, psnr: float, fields: dict[str, Any]) -> tuning.Measured:
    return tuning.Measured(name, fields, speed, speed, speed, psnr, 1.0, 0.0)


# Tuning


class Stopwatch(tuning.Trial):
    """A trial of grey pictures whose seconds and errors are known: 0.001 for each interval, 0.02 for a ratio of 1."""

    def draw(self, model: Model, prompt: str, fields: Mapping[str, Any]) -> tuning.Drawing:
        """A picture as far from 0.5 as its switches are worth."""
        interval = fields.get("cache", {}).get("interval", 0)
        ratio = fields.get("token_merging", {}).get("ratio", 0)
        off = 0.001 * interval + 0.02 * ratio
        seconds = 1 / max(interval, 1) - 0.1 * ratio
        return tuning.Drawing(torch.full((1, 16, 16, 3), 0.5 + off), torch.full((1, 4, 2, 2), 1 + off), seconds)


def test_the_fastest_inside_the_budget_is_kept(model: Model) -> None:
    """Singly the fastest is interval 5; with tokens merged by 0.25 it is faster still, and 0.01 off: 40 dB."""
    trial = Stopwatch(prompts=("a", "b"))
    told: list[tuple[int, int]] = []
    found = tuning.tune(model, lambda: model, trial, tuning.Budget("psnr", 39.9), lambda *now: told.append(now))
    by_name = {one.name: one for one in found.measured}
    assert by_name["cache, interval 5"].speed == pytest.approx(5)
    assert by_name["cache, interval 5"].psnr == pytest.approx(-20 * math.log10(0.005), abs=1e-2)
    assert not tuning.Budget("psnr", 39.9).allows(by_name["cache, interval 5 + token merging 0.5"])
    assert found.chosen is not None
    assert found.chosen.name == "cache, interval 5 + token merging 0.25"
    assert found.fields == {"cache": {"interval": 5, "branch": 0}, "token_merging": {"ratio": 0.25}}
    assert told[-1][0] == told[-1][1] and [done for done, _ in told] == list(range(1, len(told) + 1))
    none = tuning.tune(model, lambda: model, trial, tuning.Budget("psnr", 99))
    assert none.chosen is None and none.fields == {}


def test_what_was_found_is_remembered_by_model_and_machine(model: Model, config: Path) -> None:
    budget, fields = tuning.Budget("psnr", 35), {"cache": {"interval": 2, "branch": 0}}
    with pytest.raises(
        RequestError, match=r"fast is auto, but tiny was not tuned on this machine .* run `reverie tune`"
    ):
        resolve(model, Request.of(prompt="a", fast="auto", **WORDS))
    config.parent.mkdir(parents=True)
    config.write_text('{"another": {"cpu": {"fields": {}}}}')
    tuning.remember(model, budget, tuning.Tuned((), measured("cache", 2.0, 40.0, fields)))
    known = json.loads(config.read_text())
    assert known["another"] == {"cpu": {"fields": {}}}
    assert len(known) == 2
    full = resolve(model, Request.of(prompt="a", fast="auto", **WORDS))
    assert full.fast is None and full.cache is not None and full.cache.interval == 2
    tuning.remember(model, budget, tuning.Tuned((), None))
    assert resolve(model, Request.of(prompt="a", fast="auto", **WORDS)).cache is None


@pytest.mark.parametrize("broken", ["{", "[]", '{"a": 1}'])
def test_a_broken_file_is_named(model: Model, config: Path, broken: str) -> None:
    config.parent.mkdir(parents=True)
    config.write_text(broken)
    with pytest.raises(ConfigError, match=r"fast\.json"):
        tuning.tuned(model)


def test_broken_fields_are_named(model: Model, config: Path) -> None:
    tuning.remember(model, tuning.Budget(), tuning.Tuned((), measured("x", 2.0, 40.0, {"cache": {"interval": 0}})))
    with pytest.raises(ConfigError, match=r"fast.json is broken: cache.interval is 0: .*; tune the model again"):
        tuning.tuned(model)
