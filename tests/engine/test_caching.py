"""Feature caching and token merging through the engine: when the whole network runs, what is kept apart, no trace.

Pictures of tiny models with random weights; how near they come to exact ones says nothing about true models, so that
only what must be equal is compared, bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import reverie
from reverie.engine.bundle import Model
from reverie.engine.caching import Schedule, cached, spread
from reverie.engine.sources import data_url
from reverie.engine.thrift import Cache
from reverie.errors import RequestError
from reverie.nets.unet import UNet
from reverie.sampling.registry import load_all
from reverie.types import Asked, Cond
from tests.apps import models

EVERY_THIRD = {"interval": 3, "branch": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return reverie.load(models.folder(tmp_path_factory.mktemp("caching") / "tiny"), device="cpu", precision="float32")


def draw(model: Model, **fields: Any) -> "reverie.Result":
    usual: dict[str, Any] = {"steps": 6, "seed": 7, "sampler": "euler"}
    return model.generate("a red apple", **usual | fields)


@contextmanager
def counting(model: Model) -> Iterator[dict[str, list[int]]]:
    """Rows of every evaluation: of the network, and of its middle."""
    unet = model.parts.unet
    assert isinstance(unet, UNet)
    assert unet.mid_block is not None
    rows: dict[str, list[int]] = {"network": [], "middle": []}
    handles = [
        unet.register_forward_hook(lambda _, given, answer: rows["network"].append(len(given[0]))),
        unet.mid_block.register_forward_hook(lambda _, given, answer: rows["middle"].append(len(given[0]))),
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


# When


def test_the_uneven_schedule_by_hand() -> None:
    """The formula by hand for T = 20, N = 5, c = 6, p = 2: roots from -2.449 to 3.742 in four steps of 1.548.

    Squared with their signs and 6 added: 0, 5.19, 6.42, 10.82.
    """
    assert spread(20, 5, 6, 2.0) == (0, 5, 6, 10)


@given(st.integers(1, 200), st.integers(2, 20), st.floats(0, 1), st.floats(1, 4))
@settings(max_examples=100)
def test_schedules_serve_every_evaluation(evaluations: int, interval: int, centre: float, power: float) -> None:
    whole = spread(evaluations, interval, centre * evaluations, power)
    assert whole[0] == 0 and all(a < b for a, b in pairwise(whole)) and whole[-1] < max(evaluations, 1)
    assert len(whole) <= -(-evaluations // interval) + 1
    plan = Schedule(whole, interval)
    latest = [plan.latest(number) for number in range(evaluations + 3 * interval)]
    assert all(found <= number for number, found in enumerate(latest))
    assert {number for number, found in enumerate(latest) if number == found} >= set(whole)
    assert all(number - found < interval for number, found in enumerate(latest) if number > whole[-1])


def test_power_one_is_even() -> None:
    assert spread(12, 3, 4, 1.0) == (0, 3, 6, 9)


def test_every_third_evaluation_is_whole(model: Model) -> None:
    with counting(model) as rows:
        draw(model, cache=EVERY_THIRD)
    assert rows["network"] == [2] * 6
    assert rows["middle"] == [2] * 2


def test_two_evaluations_a_step_count_as_two(model: Model) -> None:
    with counting(model) as rows:
        draw(model, cache={"interval": 2}, sampler="heun")
    assert len(rows["network"]) == 11
    assert len(rows["middle"]) == 6


# Exactly


@pytest.mark.parametrize("sampler", list(load_all()))
def test_interval_one_is_exact_and_any_other_leaves_no_trace(model: Model, sampler: str) -> None:
    """With every sampler: the same bits before, between and after pictures that are drawn with less work."""
    exact = draw(model, sampler=sampler, steps=3)
    less = draw(model, sampler=sampler, steps=3, cache={"interval": 2}, token_merging={"ratio": 0.5})
    assert torch.isfinite(less.pixels).all()
    assert not torch.equal(less.latents, exact.latents)
    assert torch.equal(draw(model, sampler=sampler, steps=3, cache={"interval": 1}).latents, exact.latents)


def test_what_is_left_out_is_left_out_alike_every_time(model: Model) -> None:
    fields: dict[str, Any] = {"cache": {"interval": 2}, "token_merging": {"ratio": 0.5, "random": True}}
    assert torch.equal(draw(model, **fields).latents, draw(model, **fields).latents)


@pytest.mark.parametrize("fields", [{"cache": EVERY_THIRD}, {"token_merging": {"ratio": 0.5, "random": True}}])
def test_a_picture_is_the_same_alone_and_in_a_batch(model: Model, fields: dict[str, Any]) -> None:
    together = draw(model, count=3, batch_size=3, width=64, **fields)
    for i in range(3):
        alone = draw(model, seed=7 + i, width=64, **fields)
        assert (together.pixels[i] - alone.pixels[0]).abs().max() < 1e-4


def test_ratio_zero_is_exact(model: Model) -> None:
    assert torch.equal(draw(model, token_merging={"ratio": 0.0}).latents, draw(model).latents)


def test_halves_of_guidance_are_kept_apart(model: Model) -> None:
    """Outside the interval of guidance the negative half is not evaluated, and the prompt's features go on serving."""
    with counting(model) as rows:
        draw(model, guidance_start=1 / 6, guidance_end=4 / 6)
    assert rows["network"] == rows["middle"] == [1, 2, 2, 2, 1, 1]
    with counting(model) as rows:
        draw(model, guidance_start=1 / 6, guidance_end=4 / 6, cache=EVERY_THIRD)
    assert rows["network"] == [1, 2, 2, 2, 1, 1]
    # the second has no features of the negative prompt yet; the fifth finds the prompt's among those of both
    assert rows["middle"] == [1, 2, 2]


def test_the_prompt_decides_anew(model: Model) -> None:
    """Where its words change on the way, features of the old ones do not serve."""
    with counting(model) as rows:
        model.generate("[a:b:0.5]", steps=6, seed=7, sampler="euler", cache={"interval": 6})
    assert len(rows["middle"]) == 2


@pytest.mark.parametrize(("sigmas", "whole"), [((10, 8, 1, 0.5), 2), ((10, 8, 1, 1), 2), ((10, 8, 1, 5), 3)])
def test_noise_that_rises_wants_everything_anew(model: Model, sigmas: tuple[float, ...], whole: int) -> None:
    """As when Restart goes back up: what was found at little noise does not stand for what is at much."""
    unet = model.parts.unet

    def predict(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        answer: Tensor = unet(x, torch.tensor([sigma]), cond.context, cond.taps)
        return answer

    asked, context = cached(predict, unet, Cache(interval=2, branch=0), 4), torch.zeros(1, 3, 64)
    with counting(model) as rows, torch.no_grad():
        for number, sigma in enumerate(sigmas):
            asked(torch.ones(1, 4, 4, 4), sigma, Cond(context, asked=Asked(number, ("positive",))))
    assert len(rows["middle"]) == whole


def test_adapters_that_begin_want_everything_anew(model: Model, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    with counting(model) as rows:
        draw(model, cache={"interval": 6}, controls=[{"kind": "reference", "picture": data_url(picture), "start": 0.5}])
    # three steps with one evaluation each; then each with one of the reference, which is whole and not kept
    assert rows["network"] == [2] * 9
    assert len(rows["middle"]) == 1 + 3 + 1


def test_passes_and_windows_have_their_own(model: Model) -> None:
    with counting(model) as rows:
        draw(model, cache={"interval": 6}, hires={"scale": 2, "strength": 1.0})
    assert len(rows["middle"]) == 2
    wide: dict[str, Any] = {"width": 64, "tiles": {"size": 32, "overlap": 8}}
    with counting(model) as rows:
        less = draw(model, cache={"interval": 6}, **wide)
    windows = len(rows["network"]) // 6
    assert windows > 1 and len(rows["middle"]) == windows
    assert torch.equal(draw(model, cache={"interval": 1}, **wide).latents, draw(model, **wide).latents)
    assert torch.isfinite(less.pixels).all()


@pytest.mark.parametrize("guides", [["pag:scale=2"], ["pag:scale=2,end=0.5", "seg:scale=2,start=0.5"]])
def test_what_guides_ask_is_kept_apart(model: Model, guides: list[str]) -> None:
    """One after the other tap the same layer: the second does not take the first one's features for its own."""
    layered: list[str] = [f"{guide},layers=down.0" for guide in guides]
    with counting(model) as rows:
        draw(model, guides=layered, cache={"interval": 6})
    assert rows["network"] == [2, 1] * 6
    assert rows["middle"] == [2, 1] if len(guides) == 1 else [2, 1, 1]


def test_maps_of_attention_want_the_whole_network(model: Model) -> None:
    with pytest.raises(RequestError, match=r"sag.*wants the whole network.*leave out sag or cache"):
        draw(model, guides=["sag:layers=down.0"], cache={"interval": 2})


def test_what_nobody_counts_is_not_kept(model: Model) -> None:
    """A prediction outside of a run (training, another wrapper) goes through untouched."""
    unet = model.parts.unet
    seen: list[Cond] = []

    def predict(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        seen.append(cond)
        return x

    wrapped = cached(predict, unet, Cache(interval=2, branch=0), 4)
    for asked in (None, Asked(0, ("positive", None))):
        wrapped(torch.zeros(2, 4, 4, 4), 1.0, Cond(torch.zeros(2, 1, 64), asked=asked))
    assert [cond.taps for cond in seen] == [None, None]


# What cannot be


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cache": {"branch": 3}}, "cache.branch is 3; the last map that this model can begin at is 2"),
        ({"cache": {"threshold": 0.1}}, r"cache.threshold is not for this model, which has a U-Net"),
        ({"token_merging": {"ratio": 0.8}}, r"token_merging.ratio is 0.8; one token of 4 is kept, so that 0.75 is"),
        ({"cache": {"interval": 0}}, r"cache.interval is 0: input should be greater than or equal to 1"),
        ({"cache": {"intervall": 2}}, r"unknown field 'cache.intervall'; did you mean"),
        ({"fast": 4}, "fast is '4'"),
        ({"decoder": "tiny"}, "no taesd_decoder.safetensors in a folder vae_approx"),
        ({"decoder": "small"}, "decoder is 'small': expected full, tiny, or the file of a tiny decoder"),
    ],
)
def test_is_refused_in_one_line(model: Model, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        draw(model, **fields)
    assert "\n" not in str(refused.value)
