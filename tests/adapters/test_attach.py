"""Forms of networks: merged and branched alike, no trace left, any order, and what they cost."""

import gc
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reverie.adapters.attach import (
    Attachment,
    Branched,
    Way,
    acting,
    block_name,
    changed,
    formed,
)
from reverie.adapters.deltas import Delta, FullDifference, LoRA, NormDifference, assembled
from reverie.adapters.deltas.base import summed
from reverie.adapters.lora import Adapter, Coverage
from reverie.checkpoint.packed import PackedTensor
from reverie.checkpoint.quantised import QuantisedTensor
from reverie.errors import RequestError
from reverie.nets.clip_text import ClipText, ClipTextConfig
from reverie.nets.mmdit import MMDiT, MMDiTConfig
from reverie.nets.seamless import seamless
from reverie.nets.unet import UNet, UNetConfig
from tests.adapters.kinds_of_change import ALPHA, LINEAR_NAMES, change, linear

SMALL = UNetConfig(block_out_channels=(16, 32), attention=(1, 1), heads=(2, 2), context_width=16, groups=8)
TEXT = ClipTextConfig(vocab_size=99, width=16, inner_width=32, layers=2, heads=2, positions=9)
TRANSFORMER = MMDiTConfig(
    in_channels=4, out_channels=4, layers=2, heads=2, head_width=8, context_width=16, vector_width=8, positions=8
)
Said = Callable[[nn.Module], Tensor]


def random_network(network: nn.Module) -> nn.Module:
    """Weights of a size at which differences show."""
    generator = torch.Generator().manual_seed(0)
    for name, p in network.named_parameters():
        size = 0.3 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1
        p.data = torch.randn(p.shape, generator=generator) * size + (1.0 if "norm" in name and p.ndim == 1 else 0.0)
    return network.requires_grad_(False).eval()


@torch.no_grad()
def unet_says(network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    said: Tensor = network(x, torch.tensor([3.0, 500.0]), context)
    return said


@torch.no_grad()
def text_says(network: nn.Module) -> Tensor:
    said: Tensor = network(torch.arange(18).view(2, 9))
    return said


@torch.no_grad()
def transformer_says(network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    said: Tensor = network(x, torch.tensor([3.0, 500.0]), context, vector=torch.ones(2, 8))
    return said


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Said]] = {
    "unet": (lambda: random_network(UNet(SMALL)), unet_says),
    "text_encoder": (lambda: random_network(ClipText(TEXT)), text_says),
    "transformer": (lambda: random_network(MMDiT(TRANSFORMER)), transformer_says),
}


def weights(network: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions whose channels every example fits."""
    found = {p: m for p, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return {
        path: layer for path, layer in found.items()
        if isinstance(layer.weight, Tensor) and not any(n % 8 for n in layer.weight.shape[:2])
    }  # fmt: skip


def changes_of(network: nn.Module, name: str, seed: int = 0, every: int = 1) -> dict[str, Delta]:
    """One algorithm at every so-many-th layer."""
    layers = itertools.islice(weights(network).items(), 0, None, every)
    shapes = {path: tuple(layer.weight.shape) for path, layer in layers}  # type: ignore[arg-type]
    return {path: change(name, shape, seed + i) for i, (path, shape) in enumerate(shapes.items())}


def adapter(folder: Path, name: str, deltas: Mapping[str, Mapping[str, Delta]]) -> Adapter:
    """As if it had been opened from a file."""
    path = folder / f"{name}.safetensors"
    path.write_bytes(name.encode())
    matched = {part: len(own) for part, own in deltas.items()}
    return Adapter(path, name, {}, deltas, Coverage(tensors=1, matched=matched))


def three(folder: Path, network: nn.Module, part: str = "unet", every: int = 4) -> list[Attachment]:
    """Attachments of different algorithms and strengths."""
    kinds = {"style": ("lora", 0.8), "turn": ("oft", -0.5), "detail": ("lokr", 0.3)}
    return [
        Attachment(adapter(folder, name, {part: changes_of(network, kind, i, every)}), unet=strength, text=strength)
        for i, (name, (kind, strength)) in enumerate(kinds.items())
    ]


# Merged and branched


EVERYWHERE = ("lora", "oft", "loha", "dora of outputs")


@pytest.mark.parametrize(
    ("part", "name"), [(p, n) for p in NETWORKS for n in (LINEAR_NAMES if p == "unet" else EVERYWHERE)]
)
def test_merged_and_branched_say_the_same(part: str, name: str, tmp_path: Path) -> None:
    make, says = NETWORKS[part]
    network = make()
    attached = [Attachment(adapter(tmp_path, "a", {part: changes_of(network, name)}), unet=0.2, text=0.2)]
    plain = says(network)
    merged, branched = (says(formed(network, part, attached, way)) for way in ("merge", "branch"))
    assert (merged - plain).abs().max() > 1e-3
    # float32 through a dozen layers; what the issue asks is 1e-4 on pixels, which lie within [0, 1]
    torch.testing.assert_close(branched, merged, rtol=0, atol=1e-5 * float(merged.abs().max()) + 1e-6)


@pytest.mark.parametrize("way", ["merge", "branch"])
@pytest.mark.parametrize("part", NETWORKS)
def test_every_order_of_three_is_the_same_bit_for_bit(part: str, way: Way, tmp_path: Path) -> None:
    make, says = NETWORKS[part]
    network = make()
    attached = three(tmp_path, network, part)
    said = [says(formed(network, part, order, way)) for order in itertools.permutations(attached)]
    assert all(torch.equal(said[0], other) for other in said[1:])
    without = [says(formed(network, part, [a for a in order if a is not attached[1]], way)) for order in
               itertools.permutations(attached)]  # fmt: skip
    assert all(torch.equal(without[0], other) for other in without[1:])
    assert not torch.equal(said[0], without[0])


@pytest.mark.parametrize("way", ["merge", "branch"])
@pytest.mark.parametrize("part", NETWORKS)
def test_detaching_leaves_no_trace(part: str, way: Way, tmp_path: Path) -> None:
    make, says = NETWORKS[part]
    network = make()
    before, plain = {name: t.clone() for name, t in network.state_dict().items()}, says(network)
    kinds = {name: type(module) for name, module in network.named_modules()}
    form = formed(network, part, three(tmp_path, network, part), way)
    assert not torch.equal(says(form), plain)
    del form
    assert torch.equal(says(network), plain)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert {name: type(module) for name, module in network.named_modules()} == kinds


@pytest.mark.parametrize("way", ["merge", "branch"])
def test_a_form_shares_what_is_not_touched(way: Way) -> None:
    network = random_network(UNet(SMALL))
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    form = changed(network, {path: [(change("lora", (32, 32)), 1.0)]}, way)
    assert isinstance(form, UNet) and form is not network
    theirs = dict(form.named_parameters())
    touched = {name for name, p in network.named_parameters() if theirs[name] is not p}
    assert touched == ({f"{path}.weight"} if way == "merge" else set())
    assert form.down_blocks is network.down_blocks
    assert isinstance(form.get_submodule(path), nn.Linear)
    assert isinstance(form.get_submodule(path), Branched) == (way == "branch")


def test_where_nothing_applies_the_network_is_its_own_form(tmp_path: Path) -> None:
    network = random_network(UNet(SMALL))
    attachment = three(tmp_path, network)[0]
    silent = Attachment(attachment.adapter, unet=0.0)
    for part, attached in (("unet", []), ("unet", [silent]), ("text_encoder", [attachment]), ("vae", [attachment])):
        assert formed(network, part, attached) is network


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_weights_are_rounded_once(dtype: torch.dtype) -> None:
    layer = linear(dtype)
    network = nn.Sequential(layer)
    deltas = [change(name, layer.weight.shape) for name in ("lora with bias", "full", "oft")]
    merged = changed(network, {"0": [(delta, 0.4) for delta in deltas]}, "merge")[0]
    weight, bias = layer.weight.float(), layer.bias.float()
    total = weight
    for delta in deltas:
        total = delta.added(total, weight, 0.4)
    more = summed([delta.bias_difference(bias, 0.4) for delta in deltas])
    assert isinstance(merged, nn.Linear) and merged.weight.dtype == merged.bias.dtype == dtype
    assert torch.equal(merged.weight, total.to(dtype))
    assert more is not None and torch.equal(merged.bias, (bias + more).to(dtype))
    assert not merged.weight.requires_grad


@pytest.mark.parametrize("way", ["merge", "branch"])
def test_a_bias_where_there_was_none(way: Way) -> None:
    network = nn.Sequential(nn.Linear(8, 16, bias=False)).requires_grad_(False)
    form = changed(network, {"0": [(FullDifference(bias=torch.arange(16.0)), 2.0)]}, way)
    torch.testing.assert_close(form(torch.zeros(1, 8)), 2 * torch.arange(16.0)[None])


def test_norms_and_embeddings_are_merged_either_way() -> None:
    network = nn.Sequential(nn.Embedding(5, 8), nn.LayerNorm(8)).requires_grad_(False)
    table = FullDifference(torch.ones(5, 8))
    norm = NormDifference(torch.ones(8), torch.full((8,), 3.0))
    form = changed(network, {"0": [(table, 1.0)], "1": [(norm, 0.5)]}, "branch").state_dict()
    added = {name: t - network.state_dict()[name] for name, t in form.items()}
    assert {name: round(float(t.mean()), 6) for name, t in added.items()} == {
        "0.weight": 1.0, "1.weight": 0.5, "1.bias": 1.5
    }  # fmt: skip


@pytest.mark.parametrize("way", ["merge", "branch"])
def test_a_seamless_form_takes_adapters(way: Way, tmp_path: Path) -> None:
    network = random_network(UNet(SMALL))
    attached = three(tmp_path, network)
    wrapping = seamless(network, "both")
    reference = seamless(formed(network, "unet", attached, "merge"), "both")
    torch.testing.assert_close(
        unet_says(formed(wrapping, "unet", attached, way)), unet_says(reference), rtol=0, atol=1e-5
    )


# The way that is chosen


def branched(network: nn.Module) -> bool:
    return any(isinstance(module, Branched) for module in network.modules())


def test_few_evaluations_are_not_worth_a_merge() -> None:
    network = nn.Sequential(linear())
    cheap, dense = change("lora", (16, 8)), change("loha", (16, 8))
    for delta, evaluations, expected in (
        (cheap, None, False), (cheap, 1, True), (cheap, 50, False), (dense, 1, False),
    ):  # fmt: skip
        assert branched(changed(network, {"0": [(delta, 1.0)]}, evaluations=evaluations)) is expected


def test_the_wish_of_an_attachment_counts(tmp_path: Path) -> None:
    network = random_network(UNet(SMALL))
    own = adapter(tmp_path, "a", {"unet": changes_of(network, "lora")})
    merge, branch, either = (Attachment(own, way=way) for way in ("merge", "branch", "auto"))
    assert branched(formed(network, "unet", [branch, either]))
    assert not branched(formed(network, "unet", [merge, either], evaluations=1))
    assert not branched(formed(network, "unet", [branch], "merge"))


@pytest.mark.parametrize("way", ["auto", "merge", "branch"])
def test_packed_weights_stay_packed(way: Way) -> None:
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (16 * 32 // 32, 34), dtype=torch.uint8)
    blocks[:, :2] = (torch.rand(16, 1) * 0.01).half().view(torch.uint8)
    packed = PackedTensor.of(QuantisedTensor(blocks.flatten(), "Q8_0", (16, 32)))
    layer = nn.Linear(32, 16).requires_grad_(False)
    layer.register_parameter("weight", nn.Parameter(packed, requires_grad=False))
    plain = nn.Linear(32, 16).requires_grad_(False)
    plain.weight, plain.bias = nn.Parameter(packed.unpacked(), requires_grad=False), layer.bias
    x = torch.randn(3, 32)
    for name in LINEAR_NAMES:
        changes = {"0": [(change(name, (16, 32)), 0.5)]}
        form = changed(nn.Sequential(layer), changes, way)
        assert isinstance(form[0].weight, PackedTensor) and branched(form)
        expected = changed(nn.Sequential(plain), changes, "merge")(x)
        torch.testing.assert_close(form(x), expected, rtol=1e-5, atol=1e-5)


# Strengths


def test_strengths_by_part_and_block(tmp_path: Path) -> None:
    own = adapter(tmp_path, "a", {})
    attachment = Attachment(
        own, unet=0.5, text=-1.0,
        blocks={"up_blocks": 2.0, "up_blocks.1": 0.0, "IN04": 3.0, "MID": 4.0, "BASE": 5.0},
    )  # fmt: skip
    expected = {
        "down_blocks.0.resnets.0.conv1": 0.5, "down_blocks.1.attentions.0.proj_in": 1.5, "conv_out": 2.5,
        "mid_block.resnets.0.conv1": 2.0, "up_blocks.0.resnets.0.conv1": 1.0, "up_blocks.1.resnets.2.conv1": 0.0,
        "up_blocks.10.resnets.0.conv1": 1.0,
    }  # fmt: skip
    assert {path: attachment.strength("unet", path) for path in expected} == expected
    assert attachment.strength("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1") == -5.0
    assert attachment.strength("vae", "decoder.conv_in") == 0.0
    assert Attachment(own, unet=0.5).strength("transformer", "transformer_blocks.1.attn.to_q") == 0.5


@pytest.mark.parametrize(
    ("path", "name"),
    [
        # interfaces of the original layout: input_blocks, middle_block, output_blocks
        ("conv_in", "IN00"), ("down_blocks.0.resnets.0.conv1", "IN01"), ("down_blocks.0.attentions.1.proj_in", "IN02"),
        ("down_blocks.0.downsamplers.0.conv", "IN03"), ("down_blocks.2.attentions.1.proj_in", "IN08"),
        ("down_blocks.3.resnets.1.conv2", "IN11"), ("mid_block.attentions.0.proj_in", "MID"),
        ("up_blocks.0.upsamplers.0.conv", "OUT02"), ("up_blocks.3.attentions.2.proj_out", "OUT11"),
        ("time_embedding.linear_1", "BASE"),
    ],
)  # fmt: skip
def test_names_of_blocks(path: str, name: str) -> None:
    assert block_name(path) == name


def test_factors_of_blocks_change_what_is_drawn(tmp_path: Path) -> None:
    network = random_network(UNet(SMALL))
    own = adapter(tmp_path, "a", {"unet": changes_of(network, "lora")})
    off = {"down_blocks": 0.0, "up_blocks": 0.0, "MID": 0.0, "BASE": 0.0, "IN00": 0.0}
    assert formed(network, "unet", [Attachment(own, blocks=off)]) is network
    some = unet_says(formed(network, "unet", [Attachment(own, blocks={"up_blocks": 0.0})]))
    assert not torch.equal(some, unet_says(formed(network, "unet", [Attachment(own)])))


def test_steps_between_which_an_adapter_acts(tmp_path: Path) -> None:
    own = adapter(tmp_path, "a", {})
    early, late = Attachment(own, end=0.5), Attachment(own, start=0.5)
    assert [acting([early, late], n / 4) for n in range(4)] == [(early,), (early,), (late,), (late,)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unet": float("nan")}, "strength is nan"),
        ({"blocks": {"MID": float("inf")}}, "MID is inf"),
        ({"start": 0.6, "end": 0.4}, "acts from 0.6 to 0.4"),
        ({"end": 1.5}, "acts from 0.0 to 1.5"),
    ],
)
def test_impossible_attachments(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        Attachment(adapter(tmp_path, "a", {}), **settings)


@pytest.mark.parametrize("key", ["IN12", "up_blocks.7", "unet", ""])
def test_a_block_that_is_not_there(key: str, tmp_path: Path) -> None:
    network = random_network(UNet(SMALL))
    attachment = Attachment(adapter(tmp_path, "a", {}), blocks={key: 0.5})
    with pytest.raises(RequestError, match="has no block"):
        formed(network, "unet", [attachment])
    assert formed(network, "text_encoder", [attachment]) is network


# Training


@pytest.mark.parametrize("name", [n for n in LINEAR_NAMES if n != "peft ia3"])
def test_what_was_trained_is_loaded_by_what_trained_it(name: str) -> None:
    layer = linear()
    x, target = torch.randn(32, 8), torch.randn(32, 16)
    start = change(name, layer.weight.shape)
    trained = start.mapped(lambda t: nn.Parameter(t.clone()) if t.is_floating_point() else t)
    parameters = [t for ending, t in trained.tensors().items() if t.requires_grad]
    form = changed(nn.Sequential(layer), {"0": [(trained, 1.0)]})
    optimiser = torch.optim.Adam(parameters, 0.01)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = (form(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(t.grad is not None and t.grad.any() for t in parameters)
    assert layer.weight.grad is None
    tensors = {ending: t.detach() for ending, t in trained.tensors().items() if ending != "alpha"}
    loaded = assembled(tensors, ALPHA, layer.weight.shape)
    again = changed(nn.Sequential(layer), {"0": [(loaded, 1.0)]}, "merge")
    torch.testing.assert_close(again(x), form(x).detach(), rtol=0, atol=2e-5)


def test_a_norm_cannot_be_trained() -> None:
    norm = NormDifference(nn.Parameter(torch.ones(8)))
    with pytest.raises(ValueError, match="LayerNorm cannot be trained"):
        changed(nn.Sequential(nn.LayerNorm(8)), {"0": [(norm, 1.0)]})


# Cost


@pytest.mark.parametrize("way", ["merge", "branch"])
def test_two_hundred_forms_leave_nothing_behind(way: Way, tmp_path: Path) -> None:
    network = random_network(UNet(SMALL))
    attached = three(tmp_path, network, every=20)

    def things() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor | nn.Module) for thing in gc.get_objects())

    formed(network, "unet", attached, way)
    before = things()
    for _ in range(200):
        formed(network, "unet", attached, way)
    assert things() == before


def lora_of(network: nn.Module, wanted: Sequence[str], rank: int) -> dict[str, Delta]:
    """A LoRA in float16 over the layers whose path says one of some words."""
    found: dict[str, Delta] = {}
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and any(word in path for word in wanted):
            shape = layer.weight.shape
            found[path] = LoRA.fresh(shape, rank, rank / 2).mapped(lambda t: t.half())
    return found


@pytest.mark.slow
def test_a_hundred_megabytes_are_attached_in_a_second() -> None:
    networks = [(UNet(UNetConfig()), ("attentions",)), (ClipText(ClipTextConfig()), ("self_attn", "mlp"))]
    changes = [{p: [(d, 1.0)] for p, d in lora_of(net, words, 88).items()} for net, words in networks]
    size = sum(t.nbytes for own in changes for ((d, _),) in own.values() for t in d.tensors().values())
    assert 100e6 < size < 110e6
    best = {"merge": 99.0, "branch": 99.0}
    for way, _ in itertools.product(best, range(4)):
        started = time.perf_counter()
        forms = [changed(net, own, way) for (net, _), own in zip(networks, changes, strict=True)]  # type: ignore[arg-type]
        best[way] = min(best[way], time.perf_counter() - started)
        del forms
    assert best["branch"] < 1 and best["merge"] < 2
