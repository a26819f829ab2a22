"""Limits of memory: the cheapest measures first, never more than the limit, the same pictures."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import reverie
from reverie.checkpoint.packed import PackedTensor
from reverie.checkpoint.save import write_weights
from reverie.engine.budget import Plan, Planner, planned
from reverie.engine.bundle import Model
from reverie.engine.forecast import Tally
from reverie.engine.generate import prepared
from reverie.engine.measures import Measures, parse_size, shown
from reverie.engine.request import Request
from reverie.engine.resolve import resolve
from reverie.errors import RequestError
from tests.apps import models

FIELDS: dict[str, Any] = {"prompt": "a cat", "seed": 3, "steps": 2, "width": 96, "height": 96}
Open = Callable[..., Model]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """A tiny model whose files are in a precision; it computes in float32."""
    folder = tmp_path_factory.mktemp("budget")
    paths = {"float32": models.folder(folder / "float32"), "float16": models.folder(folder / "float16")}
    for file in paths["float16"].rglob("*.safetensors"):
        write_weights(file, {name: t.half() for name, t in load_file(file).items()})

    def open_(files: str = "float32", **options: Any) -> Model:
        return reverie.load(paths[files], device="cpu", precision="float32", **options)

    return open_


def _plan(model: Model, limit: int | None = None, **fields: Any) -> Plan:
    return planned(model, resolve(model, Request.of(**(FIELDS | fields))), prepared, limit)


def _drawn(model: Model, **fields: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is done is told; see below
        return model.generate(**(FIELDS | fields)).pixels


# The plan


@pytest.mark.parametrize("files", ["float32", "float16"])
def test_the_plan_is_what_is_allocated(opened: Open, files: str) -> None:
    """Within 15 % of what torch's operations make while drawing; in float32 the weights stay in their files."""
    model = opened(files, speed="plain")
    plan = _plan(model)
    with Tally() as tally:
        _drawn(model)
    assert tally.peak == pytest.approx(plan.own, rel=0.15)
    weights = sum(p.numel() for module in model.parts.modules().values() for p in module.parameters())
    held = sum({part.name.split()[0]: part.weights for part in plan.parts}.values(), start=plan.parts[0].weights)
    assert (held.own > weights) == (files == "float16")


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_quantised_weights_are_counted_as_they_are(opened: Open, weights: str) -> None:
    model = opened(weights=weights)
    part = next(part for part in _plan(model).parts if part.name == "unet")
    network = model.ready("unet", model.parts.unet)
    packed = [p.packed for p in network.parameters() if isinstance(p, PackedTensor)]
    assert packed
    assert part.weights.own == sum(p.data.nbytes + (0 if p.scale is None else p.scale.nbytes) for p in packed)


def test_the_plan_says_where_and_how_often(opened: Open) -> None:
    parts = {part.name: part for part in _plan(opened(), count=3, batch_size=2).parts}
    assert list(parts) == ["text_encoder", "unet", "vae decoder"]
    assert (parts["unet"].evaluations, parts["vae decoder"].evaluations) == (4, 2)
    assert {part.place for part in parts.values()} == {"cpu"}
    assert {part.precision for part in parts.values()} == {"float32"}
    assert parts["unet"].weights.own == 0 < parts["unet"].weights.mapped


# Limits


def test_measures_are_tried_from_the_cheapest_on(opened: Open) -> None:
    model = opened("float16")
    request = resolve(model, Request.of(**FIELDS, count=4, batch_size=4))
    ladder = list(Planner(model, request, prepared, None).ladder())
    assert ladder == [
        {"batch": 2}, {"batch": 1}, {"tile": 512}, {"tile": 256}, {"offload": True}, {"offload": True, "blocks": True},
    ]  # fmt: skip
    whole = planned(model, request, prepared).total
    found = [planned(model, request, prepared, int(share * whole)) for share in (1.0, 0.8, 0.5)]
    assert found[0].measures == Measures()
    assert [plan.measures.batch for plan in found[1:]] == [2, 1]
    for plan, share in zip(found, (1.0, 0.8, 0.5), strict=True):
        assert plan.total <= share * whole


def test_what_turns_out_not_to_be_needed_is_not_done(opened: Open) -> None:
    """Weights are what is too much here: smaller batches would not help enough, and are taken back."""
    model = opened("float16")
    fields = {"width": 32, "height": 32, "count": 2, "batch_size": 2}
    lean = min(_plan(model, **fields).total - 1, int(0.75 * _plan(model, **fields).total))
    plan = _plan(model, lean, **fields)
    assert plan.measures.offload
    assert plan.measures.batch is None


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_never_more_than_the_limit(opened: Open, share: float) -> None:
    free = opened("float16", speed="plain")
    fields = {"count": 2, "batch_size": 2}
    limit = int(share * _plan(free, **fields).total)
    _plan(free, limit, **fields)
    model = opened("float16", memory=limit, speed="plain")
    model.works |= free.works  # what a plan allocates is no part of the picture
    with Tally() as tally:
        _drawn(model, **fields)
    assert tally.peak <= limit


def test_a_limit_that_nothing_keeps_is_one_line(opened: Open) -> None:
    model = opened("float16", memory="1M")
    with pytest.raises(
        RequestError, match=r"limited to 1 MiB, and this request takes \d+ MiB at least \(.+\)"
    ) as error:
        model.generate(**FIELDS)
    assert "\n" not in str(error.value)
    assert model.measures == Measures()


def test_what_is_done_is_told_once(opened: Open) -> None:
    limit = int(0.6 * _plan(opened(), count=2, batch_size=2).total)
    model = opened(memory=limit)
    with pytest.warns(UserWarning, match=r"to stay below .*: 1 picture at a time"):
        model.generate(**FIELDS, count=2, batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**FIELDS, count=2, batch_size=2)


def test_loras_and_seamless_forms_are_not_cut_into_blocks(opened: Open) -> None:
    model = opened("float16")
    request = resolve(model, Request.of(**FIELDS, seamless="both"))
    assert {"offload": True, "blocks": True} not in list(Planner(model, request, prepared, None).ladder())


# Pictures


@pytest.mark.parametrize("files", ["float32", "float16"])
@pytest.mark.parametrize("measures", [Measures(offload=True), Measures(offload=True, blocks=True), Measures(batch=1)])
def test_the_picture_is_the_same_to_the_bit(opened: Open, files: str, measures: Measures) -> None:
    small = {"width": 64, "height": 64, "count": 2}
    want = _drawn(opened(files), **small)
    model = opened(files)
    for _ in range(2):  # what was let go comes back
        model.measures = measures
        assert torch.equal(_drawn(model, **small), want)
    model.measures = Measures()
    assert torch.equal(_drawn(model, **small), want)


def test_slices_of_attention_change_rounding_alone(opened: Open) -> None:
    model = opened()
    want = _drawn(model, width=64, height=64)
    model.measures = Measures(slices=16)
    assert (_drawn(model, width=64, height=64) - want).abs().max() < 1e-5


def test_offloaded_weights_go_back_to_their_file(opened: Open) -> None:
    model = opened("float16", offload=True)
    before = {name: p.data_ptr() for name, p in model.parts.unet.named_parameters()}
    _drawn(model, width=64, height=64)
    assert {name: p.data_ptr() for name, p in model.parts.unet.named_parameters()} == before
    assert {p.dtype for p in model.parts.unet.parameters()} == {torch.float16}
    assert {name for _, name in model._residents.placed} == {"vae"}


# Sizes in words


@pytest.mark.parametrize(
    ("text", "size"), [("6G", 6 * 2**30), ("800M", 800 * 2**20), ("1.5GiB", 3 * 2**29), ("2 kb", 2048), (4096, 4096)]
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "six", "6X", "1e9"])
def test_other_sizes_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"memory is .*; expected a size such as 6G"):
        parse_size(text)


def test_sizes_are_shown() -> None:
    assert [shown(n) for n in (512, 5 * 2**20, 3 * 2**29)] == ["0 KiB", "5 MiB", "1.50 GiB"]
