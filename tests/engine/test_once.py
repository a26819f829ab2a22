"""What is computed once a picture: how often it is, that nothing else changes, that nothing is left."""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reverie
from reverie.adapters.taps import beneath
from reverie.engine import drawing
from reverie.engine.bundle import Model
from reverie.engine.once import MOST, Prompts, copies, once
from reverie.nets.attention import Attention
from reverie.nets.unet import UNet
from reverie.types import Asked, Cond, Predict, Taps
from tests.apps import models
from tests.engine import test_adapters
from tests.nets.test_unet import made

# Sums of fewer rows at once are formed in another order: some roundings of float32, on numbers around 1.
CLOSE = 1e-5
WORDS = "a red apple"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return reverie.load(models.folder(tmp_path_factory.mktemp("once") / "tiny"), device="cpu", precision="float32")


def draw(model: Model, prompt: str = WORDS, **fields: Any) -> Tensor:
    usual: dict[str, Any] = {"steps": 4, "seed": 7, "sampler": "euler"}
    return model.generate(prompt, **usual | fields).latents


@contextmanager
def counting(model: Model) -> Iterator[Counter[str]]:
    """How often projections of a prompt run, and how many rows the first convolution and the whole network see."""
    unet, seen = model.parts.unet, Counter[str]()
    assert isinstance(unet, UNet)
    layer = next(m for path, m in unet.named_modules() if isinstance(m, Attention) and path.endswith("attn2"))

    def rows(name: str) -> Any:
        return lambda _, given, answer: seen.update({name: len(given[0])})

    handles = [
        layer.to_k.register_forward_hook(lambda *_: seen.update({"keys": 1})),
        layer.to_v.register_forward_hook(lambda *_: seen.update({"values": 1})),
        unet.conv_in.register_forward_hook(rows("first")),
        unet.register_forward_hook(rows("whole")),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(predict: Predict, network: object) -> Predict:
        return predict

    monkeypatch.setattr(drawing, "once", apart)


@pytest.mark.parametrize(
    ("fields", "times"),
    [
        ({}, 1),
        ({"count": 2, "batch_size": 2}, 1),
        ({"count": 2, "batch_size": 1}, 2),
        ({"guidance_scale": 1.0}, 1),
        ({"guidance_end": 0.5}, 2),  # with the negative prompt and without
        ({"prompt": "a [red:green:0.5] apple"}, 2),
        ({"prompt": "a [red|green] apple"}, 2),  # in turn: either is known again
        ({"hires": {"scale": 2.0, "strength": 0.5}}, 2),  # a run of the sampler each
    ],
)
def test_the_prompt_is_projected_once(model: Model, fields: dict[str, Any], times: int) -> None:
    with counting(model) as seen:
        draw(model, **fields)
    assert (seen["keys"], seen["values"]) == (times, times)


@pytest.mark.parametrize(
    ("fields", "shared"),
    [
        ({}, True),
        ({"count": 3, "batch_size": 3}, True),
        ({"cache": {"interval": 2}}, True),
        ({"token_merging": {"ratio": 0.5}}, False),  # tokens are tapped
        ({"guidance_scale": 1.0}, False),  # one condition alone
    ],
)
def test_what_comes_before_the_prompt_is_computed_once(model: Model, fields: dict[str, Any], shared: bool) -> None:
    with counting(model) as seen:
        draw(model, **fields)
    assert seen["first"] * (2 if shared else 1) == seen["whole"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"count": 2, "batch_size": 2, "width": 40},
        {"prompt": "a [red:green:0.5] apple AND a dog :0.5", "negative_prompt": "blue"},
        {"guides": [{"name": "pag"}, {"name": "sag"}]},
        {"cache": {"interval": 2, "branch": 1}},
        {"token_merging": {"ratio": 0.5}},
        {"seamless": "both", "tiles": {"size": 32, "overlap": 16}, "width": 64},
        {"hires": {"scale": 1.5, "strength": 0.6}, "sampler": "heun"},
    ],
    ids=lambda fields: ",".join(fields) or "plain",
)
def test_pictures_stay_what_they_are(model: Model, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shared = draw(model, **fields)
    without(monkeypatch)
    apart = draw(model, **fields)
    assert (shared - apart).abs().max() < CLOSE * apart.abs().max()


def test_loras_that_begin_and_end_have_prompts_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA changes the projections of the prompt: what was kept without it must not answer with it."""
    folder = models.folder(tmp_path / "tiny")
    path = test_adapters.lora(tmp_path / "a.safetensors", "lora", 0, folder)
    model = reverie.load(folder, device="cpu", precision="float32")
    limited: dict[str, Any] = {"loras": [{"path": str(path), "strength": 1.0, "start": 0.25, "end": 0.75}]}
    shared, plain = draw(model, **limited), draw(model)
    without(monkeypatch)
    assert (shared - draw(model, **limited)).abs().max() < CLOSE * shared.abs().max()
    assert (shared - plain).abs().max() > 100 * CLOSE


def test_layers_of_a_form_are_known_apart() -> None:
    one, other, context = Attention(8, 2, 6), Attention(8, 2, 6), torch.randn(2, 5, 6)
    known = Prompts()
    for layer in (one, other, one):
        for found, own in zip(known(layer, context), layer.keys_values(context), strict=True):
            assert torch.equal(found, own)


def test_memory_is_bounded_and_the_latest_stay() -> None:
    known, layer = Prompts(), Attention(8, 2, 6)
    contexts = [torch.randn(1, 5, 6) for _ in range(MOST + 1)]
    pairs = [known(layer, context) for context in contexts]
    gone = [weakref.ref(pair[0]) for pair in pairs]
    assert known(layer, contexts[1])[0] is pairs[1][0]
    assert known(layer, contexts[0])[0] is not pairs[0][0]  # was the oldest; now it takes the place of the third
    del pairs
    gc.collect()
    assert [reference() is None for reference in gone] == [True, False, True, *[False] * (MOST - 2)]


def test_nothing_is_left_after_a_picture(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made_of: list[weakref.ref[Prompts]] = []

    class Watched(Prompts):
        def __init__(self) -> None:
            super().__init__()
            made_of.append(weakref.ref(self))

    monkeypatch.setattr("reverie.engine.once.Prompts", Watched)
    draw(model)
    gc.collect()
    assert len(made_of) == 1 and made_of[0]() is None


# Copies


@pytest.mark.parametrize("levels", [{"attention": (1, 0)}, {"layers_per_block": 1}, {"cross_only": (True, False)}])
def test_equal_rows_are_computed_once_up_to_the_first_look_at_the_prompt(levels: dict[str, Any]) -> None:
    """Wherever that is: in the first level, in the second, or at once."""
    network = made(**levels)
    x, context = torch.randn(2, 4, 8, 8).repeat(3, 1, 1, 1), torch.randn(6, 5, 16)
    times = torch.full((6,), 300.0)
    rows: list[int] = []
    handle = network.down_blocks[0].resnets[0].register_forward_hook(lambda _, given, y: rows.append(len(y)))  # type: ignore[union-attr, index]
    shared, whole = network(x, times, context, Taps(copies=3)), network(x, times, context)
    handle.remove()
    assert rows == [2, 6]
    assert (shared - whole).abs().max() < CLOSE * whole.abs().max()


def test_rows_that_a_tap_may_tell_apart_are_not_shared() -> None:
    network = made()
    x, context, times = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.randn(2, 5, 16), torch.full((2,), 300.0)
    path = next(path for path, _ in network.named_modules() if path.endswith("attn1"))

    def second_alone(module: object, y: Tensor, context: Tensor | None, usual: Any) -> Tensor:
        found: Tensor = usual()
        return found * torch.tensor([0.0, 1.0])[:, None, None]

    taps = Taps(attention={path: second_alone})
    together = Taps(attention={path: second_alone}, copies=2)
    assert torch.equal(network(x, times, context, together), network(x, times, context, taps))


def test_only_the_context_may_differ() -> None:
    context, asked = torch.zeros(2, 5, 6), Asked(0, ("positive", "negative"))
    assert copies(Cond(context, asked=asked)) == 2
    assert copies(Cond(context)) == 1
    assert copies(Cond(context, vector=torch.zeros(2, 3), asked=asked)) == 1
    assert copies(Cond(context, channels=torch.zeros(2, 1, 4, 4), asked=asked)) == 1


def test_taps_that_are_there_stay() -> None:
    seen: list[Cond] = []

    def predict(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        seen.append(cond)
        return x

    cond = beneath(Cond(torch.zeros(1, 5, 16)), {"a": lambda module, x, context, usual: usual()})
    once(predict, made())(torch.zeros(1, 4, 8, 8), 1.0, cond)
    assert seen[0].taps is not None
    assert set(seen[0].taps.attention) == {"a"} and seen[0].taps.prompt is not None
