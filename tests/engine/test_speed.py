"""The execution plan: precision by device, and networks whose layers are computed in the ways that cost the least.

Pictures are drawn by tiny models whose every layer is forced into one way after the other; they must be those of the
plain networks within 1e-4 of [0, 1], as wherever sums run in another order.
"""

import gc
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import reverie
from reverie.apps import options
from reverie.checkpoint.packed import is_halved
from reverie.engine import bundle, calibration, speed
from reverie.engine.bundle import Model
from reverie.engine.calibration import Calibration, Cost, Trial
from reverie.engine.generate import batches
from reverie.engine.image import fingerprint
from reverie.engine.placing import place
from reverie.engine.processor import Processor
from reverie.engine.remembered import Remembered
from reverie.engine.request import Request
from reverie.engine.resolve import resolve
from reverie.engine.speed import ByCost, Speed, automatic_precision, layout_for
from reverie.errors import RequestError
from reverie.nets import ways
from reverie.nets.attention import Attention
from reverie.nets.ways import ChosenConv2d, ChosenLinear
from tests.adapters.controls import control, diffusers
from tests.apps import models

CLOSE = 1e-4
CPU = torch.device("cpu")
OLD, NEW = Processor("old", frozenset({"avx2"}), 2), Processor("new", frozenset({"avx512_bf16"}), 2)
WAYS = ("plain", "onednn", "channels_last", "packed", "fused", "winograd", "blocks")


@pytest.fixture(autouse=True)
def large_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every network is large, every layer counts, and nothing is known of this machine."""
    monkeypatch.setattr(speed, "LARGE", 1)
    monkeypatch.setattr(ways, "LEAST", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def prefer(name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let one way be measured as the fastest wherever it is one of them; the list grows with every measurement."""
    measured: list[int] = []

    def timed(trials: Mapping[str, Trial]) -> dict[str, Cost]:
        measured.append(len(trials))
        return {each: Cost(0.5 if each == name else 1.0) for each in trials}

    monkeypatch.setattr(calibration, "timed", timed)
    return measured


# Precision, and where there is nothing to choose


@pytest.mark.parametrize(
    ("device", "capability", "large", "processor", "dtype"),
    [
        ("cuda", (9, 0), True, OLD, torch.bfloat16),
        ("cuda", (8, 0), False, OLD, torch.bfloat16),
        ("cuda", (7, 5), True, OLD, torch.float16),
        ("cuda", (6, 1), True, OLD, torch.float32),
        ("mps", None, True, OLD, torch.float16),
        ("cpu", None, True, OLD, torch.float32),
        ("cpu", None, True, NEW, torch.bfloat16),
        ("cpu", None, False, NEW, torch.float32),
    ],
)
def test_automatic_precision(
    device: str, capability: Any, large: bool, processor: Processor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reverie.engine.processor.onednn_computes", lambda _: True)
    found = automatic_precision(torch.device(device), large=large, processor=processor, capability=capability)
    assert found == dtype


def test_precision_and_speed_can_be_said(tmp_path: Path) -> None:
    path = models.folder(tmp_path / "tiny")
    model = reverie.load(path, device="cpu", precision="float32", speed="plain")
    assert model.dtype == torch.float32
    assert model.network("unet", evaluations=50) is model.parts.unet
    assert "plain" in model.speed.describe()
    with pytest.raises(RequestError, match="unknown speed 'fast'; known: auto, plain"):
        reverie.load(path, speed="fast")  # type: ignore[arg-type]


def test_the_command_line_knows_the_same_words() -> None:
    assert tuple(options.SpeedMode) == speed.MODES


@pytest.mark.parametrize(("precision", "told"), [("float32", None), ("bfloat16", "bfloat16")])
def test_pictures_say_in_which_precision_they_were_drawn(precision: Any, told: str | None, tmp_path: Path) -> None:
    model = reverie.load(models.folder(tmp_path / "tiny"), device="cpu", precision=precision)
    assert fingerprint(model).get("precision") == told


def test_small_networks_and_other_devices_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Linear(8, 8).requires_grad_(False)
    assert Speed(torch.device("meta"), torch.float16).form(network, 50) is network
    assert isinstance(Speed(CPU, torch.float32).form(network, 50), nn.Linear)
    monkeypatch.setattr(speed, "LARGE", 65 + 8)
    assert Speed(CPU, torch.float32).form(network, 50) is network


def test_layouts() -> None:
    assert layout_for(torch.device("cuda"), torch.bfloat16) == torch.channels_last
    assert layout_for(torch.device("cuda"), torch.float32) == torch.preserve_format
    assert layout_for(CPU, torch.bfloat16) == torch.preserve_format
    first = nn.Conv2d(4, 8, 3)
    network = nn.Sequential(first, nn.Flatten(), nn.Linear(8, 3))
    x = torch.randn(2, 4, 3, 3)
    before = network(x)
    place(network, CPU, torch.float32, layout=torch.channels_last)
    assert first.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(network(x), before, atol=1e-6)


@pytest.mark.parametrize("device", ["cuda", "mps", "cpu"])
def test_the_plan_is_one_line(device: str) -> None:
    line = Speed(torch.device(device), torch.float16, processor=NEW).describe()
    assert "float16" in line and "\n" not in line and ("new" in line) == (device == "cpu")


def test_threads_are_settled_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    Speed(CPU, torch.float32, "plain", processor=OLD).settle_threads()
    Speed(torch.device("meta"), torch.float32, processor=OLD).settle_threads()
    assert not asked
    Speed(CPU, torch.float32, processor=OLD).settle_threads()
    assert asked == [2]


# Which way


def linear_used(plan: Speed, calls: int, x: Tensor) -> str:
    """The way in which a chooser for so many calls computes a linear layer."""
    layer, chooser = nn.Linear(16, 16).requires_grad_(False), ByCost(plan, calls)
    with torch.no_grad():
        for _ in range(2):  # the first call measures nothing
            assert torch.allclose(chooser.linear(layer, x), layer(x), atol=1e-5)
    (choice,) = chooser._choices.values()
    return str(choice.later.name)


def test_the_first_step_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = prefer("packed", monkeypatch)
    layers = [nn.Linear(16, 16).requires_grad_(False) for _ in range(2)]
    chooser, x, q = ByCost(Speed(CPU, torch.float32), 16), torch.randn(4, 16), torch.randn(1, 1, 4, 8)
    for rows in (1, 2):  # a larger picture has a first step, too
        before = len(measured)
        for step, seen in enumerate((0, 2, 2)):
            for layer in layers:
                assert torch.allclose(chooser.linear(layer, x[:rows]), layer(x[:rows]), atol=1e-5)
                chooser.attend(q[:, :, :rows], q, q)
            assert len(measured) - before == seen, step


def test_short_runs_measure_nothing_but_use_what_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = prefer("packed", monkeypatch)
    plan = Speed(CPU, torch.float32, calibration=Calibration(Remembered(tmp_path / "speed.json"), "here"))
    x = torch.randn(4, 16)
    assert linear_used(plan, 4, x) == "plain" and not measured
    assert linear_used(plan, 16, x) == "packed" and len(measured) == 1
    assert linear_used(plan, 4, x) == "packed" and len(measured) == 1  # and it pays at once by these costs
    assert linear_used(plan, 16, torch.randn(5, 16)) == "packed" and len(measured) == 2  # of another shape


def test_packing_that_is_not_repaid_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"plain": Cost(1.0), "onednn": Cost(1.0), "packed": Cost(0.5, 10.0)}
    monkeypatch.setattr(calibration, "timed", lambda _: costs)
    plan, x = Speed(CPU, torch.float32), torch.randn(4, 16)
    assert linear_used(plan, 64, x) == "packed"
    assert linear_used(plan, 16, x) == "plain"


def test_the_first_call_makes_no_weight_ready_that_it_does_not_repay(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"plain": Cost(1.0), "onednn": Cost(1.0), "packed": Cost(0.5, 2.0)}
    monkeypatch.setattr(calibration, "timed", lambda _: costs)
    plan, x = Speed(CPU, torch.float32), torch.randn(4, 16)
    layer, chooser = nn.Linear(16, 16).requires_grad_(False), ByCost(plan, 16)
    for packed in (False, True, True):
        assert torch.allclose(chooser.linear(layer, x), layer(x), atol=1e-5)
        assert (plan.packs.size > 0) is packed


@pytest.mark.parametrize(("saved", "name"), [(2.0, "winograd"), (0.5, "plain")])
def test_memory_has_its_price(saved: float, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv2d(64, 64, 3, padding=1).requires_grad_(False), torch.randn(1, 64, 8, 8)
    price = 4 * layer.weight.nbytes * speed.PRICE  # of Winograd's weights, for a call
    monkeypatch.setattr(
        calibration, "timed", lambda trials: {n: Cost(price * (3 - saved * (n == "winograd"))) for n in trials}
    )
    chooser = ByCost(Speed(CPU, torch.float32), 16)
    for _ in range(2):
        chooser.convolution(layer, x)
    (choice,) = chooser._choices.values()
    assert choice.later.name == name


def test_where_memory_is_short_layers_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer("packed", monkeypatch)
    monkeypatch.setattr(speed, "available", lambda _: 100)
    plan, x = Speed(CPU, torch.float32), torch.randn(4, 16)
    assert linear_used(plan, 16, x) == "packed"  # chosen, but there is no room
    assert plan.packs.size == 0


def test_without_the_private_operators_layers_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer("packed", monkeypatch)
    monkeypatch.setattr("reverie.nets.ways.onednn_computes", lambda _: False)
    assert linear_used(Speed(CPU, torch.float32), 16, torch.randn(4, 16)) == "plain"


def test_gradients_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer("packed", monkeypatch)
    layer, x = nn.Linear(16, 16).requires_grad_(False), torch.randn(4, 16, requires_grad=True)
    form = Speed(CPU, torch.float32).form(layer, 16)
    form(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, layer.weight.sum(0).expand(4, -1), atol=1e-6)


@pytest.mark.parametrize(("dtype", "processor", "keys", "guess"), [
    (torch.float32, NEW, 2048, "attention"), (torch.bfloat16, NEW, 2048, "attention_by_blocks"),
    (torch.bfloat16, NEW, 77, "attention"), (torch.bfloat16, OLD, 2048, "attention"),
])  # fmt: skip
def test_the_guess_of_attention(
    dtype: torch.dtype, processor: Processor, keys: int, guess: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reverie.engine.processor.onednn_computes", lambda _: True)
    chooser = ByCost(Speed(CPU, dtype, processor=processor), 1)
    q, k = torch.zeros(1, 1, 4, 8, dtype=dtype), torch.zeros(1, 1, keys, 8, dtype=dtype)
    assert chooser.attend(q, k, k).shape == q.shape
    (way,) = chooser._attention.values()
    assert way.__name__ == guess


@pytest.mark.parametrize(("dtype", "side", "guess"), [
    (torch.float32, 8, "plain"), (torch.float32, 64, "channels_last"), (torch.bfloat16, 8, "plain"),
])  # fmt: skip
def test_the_guess_of_convolutions(dtype: torch.dtype, side: int, guess: str) -> None:
    layer, chooser = nn.Conv2d(4, 4, 3, dtype=dtype).requires_grad_(False), ByCost(Speed(CPU, dtype), 1)
    with torch.no_grad():
        chooser.convolution(layer, torch.zeros(1, 4, side, side, dtype=dtype))
    (choice,) = chooser._choices.values()
    assert choice.first.name == choice.later.name == guess


@pytest.mark.parametrize(("calls", "side", "channels", "guess"), [
    (1, 64, 256, "winograd"), (8, 24, 256, "winograd"), (1, 40, 256, "plain"), (1, 64, 128, "channels_last"),
])  # fmt: skip
def test_deep_convolutions_are_guessed_where_their_weights_are_repaid(
    calls: int, side: int, channels: int, guess: str
) -> None:
    layer = nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False)
    assert speed._guessed_convolution(layer, torch.zeros(2, channels, side, side), calls).name == guess


# Whole pictures


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.folder(tmp_path_factory.mktemp("speed") / "tiny")


@pytest.fixture(scope="module")
def usual(root: Path) -> Model:
    return reverie.load(root, device="cpu", precision="float32", speed="plain")


def opened(root: Path) -> Model:
    return reverie.load(root, device="cpu", precision="float32")


def draw(model: Model, **fields: Any) -> Tensor:
    given = {"steps": 8, "seed": 7, "guidance_scale": 5.0, "width": 64, "height": 64}
    return model.generate("a red apple", **given | fields).pixels


FIELDS: dict[str, dict[str, Any]] = {
    "alone": {}, "seamless": {"seamless": "both"}, "cached": {"cache": {"interval": 3, "branch": 0}},
    "merged tokens": {"token_merging": {"ratio": 0.5}}, "in tiles": {"vae_tile": 32},
    "perturbed": {"guides": [{"name": "pag"}]}, "larger": {"hires": {"scale": 2.0}},
    "several": {"count": 3, "batch_size": 2, "steps": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_pictures_in_every_way(name: str, root: Path, usual: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, model = prefer(name, monkeypatch), opened(root)
    assert (draw(model) - draw(usual)).abs().max() < CLOSE
    assert measured and (model.speed.packs.size > 0) == (name in {"packed", "fused", "winograd"})
    seen = len(measured)
    draw(model, seed=8)
    assert len(measured) == seen  # the second picture finds everything


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model in float16."""
    return models.folder(tmp_path_factory.mktemp("speed") / "halves", dtype=torch.float16)


@pytest.mark.parametrize("name", WAYS)
def test_pictures_of_halves_that_stay_where_they_lie(name: str, halves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(name, monkeypatch)
    model, plain = opened(halves), reverie.load(halves, device="cpu", precision="float32", speed="plain")
    own, right = draw(model), draw(plain)
    assert (own - right).abs().max() < CLOSE
    weights = [p for part in model.parts.modules().values() for p in part.parameters() if p.ndim > 1]
    assert all(is_halved(p) and p.dtype == torch.float32 for p in weights)
    assert not any(is_halved(p) for part in plain.parts.modules().values() for p in part.parameters())
    # one widened or prepared weight for each layer that is asked often, and nothing beside it
    unet = sum(p.numel() * 4 for p in model.parts.unet.parameters() if p.ndim > 1)
    assert model.speed.packs.size >= unet
    assert (draw(model) - right).abs().max() < CLOSE


@pytest.mark.parametrize("name", WAYS)
def test_pictures_in_bfloat16_of_halves_in_float16(name: str, halves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay in their file, too, and the picture is as near that of float32 as plain layers' is."""
    prefer(name, monkeypatch)
    model, plain = (reverie.load(halves, device="cpu", precision="bfloat16", speed=mode) for mode in ("auto", "plain"))
    true = draw(opened(halves))
    own, usual = (float((draw(one) - true).square().mean().sqrt()) for one in (model, plain))
    assert 0 < own < 1.5 * usual
    weights = [p for p in model.parts.unet.parameters() if p.ndim > 1]
    assert all(is_halved(p) and p.dtype == torch.bfloat16 for p in weights)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_pictures_of_halves_with_other_fields(
    fields: dict[str, Any], halves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer("packed", monkeypatch)
    plain = reverie.load(halves, device="cpu", precision="float32", speed="plain")
    assert (draw(opened(halves), **fields) - draw(plain, **fields)).abs().max() < CLOSE


def test_the_last_picture_lets_its_network_go(halves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer("packed", monkeypatch)
    model, held = opened(halves), []
    request = resolve(model, Request.of(prompt="a red apple", steps=8, seed=7, width=64, height=64, count=2))
    decode = model.decode

    def decoding(latents: Tensor, request: Request) -> Tensor:
        held.append(model.speed.packs.size)
        return decode(latents, request)

    monkeypatch.setattr(model, "decode", decoding)
    found = torch.cat([result.pixels for result in batches(model, request, last=True)])
    unet, vae = (4 * sum(p.numel() for p in part.parameters()) for part in (model.parts.unet, model.parts.vae))
    assert held[0] > 0.9 * unet and held[1] < vae  # what is left is the decoder's, of the first picture
    assert not any(is_halved(p) for p in model.parts.unet.parameters())
    again = model.generate("a red apple", steps=8, seed=7, width=64, height=64, count=2).pixels
    assert (found - again).abs().max() < CLOSE


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_packed_pictures_with_other_fields(
    fields: dict[str, Any], root: Path, usual: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer("packed", monkeypatch)
    model = opened(root)
    assert (draw(model, **fields) - draw(usual, **fields)).abs().max() < CLOSE
    assert model.speed.packs.size > 0


def test_a_controlnet_is_computed_in_the_ways_chosen(
    root: Path, usual: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(root / "unet")
    control(unet, conditioning_embedding_out_channels=(8, 8, 16, 16)).save_pretrained(tmp_path / "net")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "edges.png")
    fields = {"controls": [{"kind": "canny", "picture": str(tmp_path / "edges.png"), "net": str(tmp_path / "net")}]}
    measured, plain = prefer("winograd", monkeypatch), draw(opened(root))
    alone = len(measured)
    found = draw(opened(root), **fields)
    assert len(measured) > alone > 0 and (found - plain).abs().max() > CLOSE
    assert (found - draw(usual, **fields)).abs().max() < CLOSE


def test_the_network_is_shared_and_untouched(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer("packed", monkeypatch)
    model = opened(root)
    before = [p.clone() for p in model.parts.unet.parameters()]
    draw(model)
    form = model.network("unet", evaluations=16)
    assert form is model.network("unet", evaluations=20) and form is not model.network("unet", evaluations=2)
    assert all(a is b for a, b in zip(form.parameters(), model.parts.unet.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parts.unet.parameters(), strict=True))
    assert not any(isinstance(m, ChosenLinear | ChosenConv2d) for m in model.parts.unet.modules())
    assert all(m.attend.__name__ == "attention" for m in model.parts.unet.modules() if isinstance(m, Attention))


def test_a_network_that_was_brought_anew_has_a_new_form() -> None:
    """As offloading does with packed weights of files: the module stays, its weights are others (`Model.ready`)."""
    network, plan = nn.Linear(16, 16).requires_grad_(False), Speed(CPU, torch.float32)
    form = plan.form(network, 16)
    assert plan.form(network, 16) is form
    network.register_parameter("weight", nn.Parameter(torch.ones(16, 16), requires_grad=False))
    plan.forget()
    assert plan.form(network, 16).weight is network.weight


@pytest.mark.parametrize("large", [True, False])
def test_a_network_that_nobody_has_goes_with_its_forms(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LARGE", 1 if large else 1 << 30)
    network, plan = nn.Sequential(nn.Linear(16, 16).requires_grad_(False)), Speed(CPU, torch.float32)
    assert (plan.form(network, 16) is network) is not large
    seen = weakref.ref(network)
    del network
    gc.collect()
    assert seen() is None and not plan._forms


def test_packed_layers_go_with_the_model(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer("packed", monkeypatch)
    model = opened(root)
    draw(model)
    packs = model.speed.packs
    assert packs.size > 0
    del model
    gc.collect()
    assert packs.size == 0


def test_two_pictures_at_once(root: Path, usual: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer("packed", monkeypatch)
    model, found = opened(root), dict[int, Tensor]()
    threads = [threading.Thread(target=lambda s=s: found.update({s: draw(model, seed=s)})) for s in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[seed] - draw(usual, seed=seed)).abs().max() < CLOSE for seed in (1, 2))


def test_the_packaged_model_is_drawn_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LARGE", 50_000_000)
    model = reverie.load(bundle.bundled_path(), device="cpu")
    assert model.dtype == torch.float32  # on every processor
    assert model.network("unet", evaluations=50) is model.parts.unet
