"""What a rehearsal says would be asked is what is asked when it is drawn."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import reverie
from reverie.engine.bundle import Model
from reverie.engine.generate import prepared
from reverie.engine.rehearsal import rehearse
from reverie.engine.request import Request
from reverie.engine.resolve import resolve
from tests.apps import models

Asked = Counter[tuple[str, int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return reverie.load(models.folder(tmp_path_factory.mktemp("rehearsal") / "m"), device="cpu", precision="float32")


REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no guidance": {"guidance_scale": 1},
    "guidance in between": {"steps": 5, "guidance_start": 0.3, "guidance_end": 0.7},
    "two evaluations a step": {"sampler": "heun", "steps": 3},
    "several at once": {"count": 5, "batch_size": 2},
    "perturbed": {"guides": "pag"},
    "AND": {"prompt": "a cat AND a dog :0.5"},
    "hires": {"hires": {"scale": 2, "strength": 0.5}},
    "hires by pixels": {"hires": {"scale": 2, "strength": 0.5, "upscaler": "lanczos"}},
    "cached": {"steps": 6, "cache": {"interval": 3}},
    "merged tokens": {"token_merging": {"ratio": 0.5}},
    "tiled": {"width": 64, "tiles": {"size": 32, "overlap": 16}},
    "long prompt": {"prompt": "x " * 200},
}


def _really(model: Model, request: Request) -> Asked:
    """How often every network is asked, and about how many rows at once."""
    found: Asked = Counter()
    vae, tower = model.parts.vae, model.parts.towers[0]
    networks: dict[str, nn.Module] = {
        "unet": model.parts.unet, "vae decoder": vae.decoder, "vae encoder": vae.encoder, tower.name: tower.module
    }  # fmt: skip
    names = {id(module): name for name, module in networks.items()}

    def told(module: nn.Module, args: Any) -> None:
        found[names[id(module)], len(args[0])] += 1

    hooks = [module.register_forward_pre_hook(told) for module in networks.values()]
    model.draw(request)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", REQUESTS)
def test_networks_are_asked_as_often(model: Model, name: str) -> None:
    request = resolve(model, Request.of(**{"prompt": "a cat", "seed": 3, "steps": 2} | REQUESTS[name]))
    rehearsal = rehearse(model, request, prepared, model.works)
    said: Asked = Counter()
    for call in rehearsal.calls:
        said[call.part, call.rows] += int(call.times)
    want = _really(model, request)
    texts = {key for key in said if key[0] == "text_encoder"}  # each group encodes its own words again in a rehearsal
    assert {key: n for key, n in said.items() if key not in texts} == {
        key: n for key, n in want.items() if key[0] != "text_encoder"
    }
    assert texts <= want.keys()


def test_a_rehearsal_reads_no_weight(tmp_path: Path) -> None:
    """With NaN for weights nothing changes: drawing would refuse them."""
    model = reverie.load(models.folder(tmp_path / "m"), device="cpu", precision="float32")
    request = resolve(model, Request.of(prompt="a cat", seed=3))
    sound = rehearse(model, request, prepared, {})
    for p in model.parts.unet.parameters():
        p.data = torch.full_like(p, float("nan"))
    broken = rehearse(model, request, prepared, {})
    assert [call.work for call in broken.calls] == [call.work for call in sound.calls]


def test_caching_and_merging_are_less_work(model: Model) -> None:
    def work(**fields: Any) -> int:
        usual = {"prompt": "a cat", "seed": 3, "steps": 6, "width": 256, "height": 256}
        request = resolve(model, Request.of(**(usual | fields)))
        calls = rehearse(model, request, prepared, model.works).calls
        return sum(call.work.total for call in calls if call.part == "unet")

    whole = work()
    assert work(cache={"interval": 3}) < 0.8 * whole
    assert work(token_merging={"ratio": 0.5}) < whole
    assert whole / 2 <= work(guidance_scale=1) < 0.6 * whole  # what both halves share is done once


def test_works_that_are_known_are_not_found_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    request = resolve(model, Request.of(prompt="a cat", seed=3, steps=3))
    works: dict[Any, Any] = {}
    first = rehearse(model, request, prepared, works)
    monkeypatch.setattr("reverie.engine.rehearsal.counted", None)
    assert rehearse(model, request, prepared, works).calls == first.calls
