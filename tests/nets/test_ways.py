"""Every way to compute a layer says the same; forms that leave the choice to somebody touch nothing else."""

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.adapters.attach import changed
from reverie.adapters.deltas import LoRA
from reverie.checkpoint.packed import PackedTensor
from reverie.checkpoint.quantised import QuantisedTensor
from reverie.nets import attention as attention_module
from reverie.nets import ways
from reverie.nets.attention import ATTENTION, Layer, attention, attention_by_blocks, gated
from reverie.nets.blocks import ResnetBlock
from reverie.nets.mmdit import MMDiT, MMDiTConfig
from reverie.nets.seamless import seamless
from reverie.nets.unet import UNet, UNetConfig
from reverie.nets.ways import CONVOLUTION, GATED, LINEAR, ChosenConv2d, ChosenLinear, Way, chosen, onednn_computes
from reverie.nets.winograd import TILES

EXACT = 1e-5  # of the largest number: sums of up to 10,000 products of float32 in another order
UNET = UNetConfig(block_out_channels=(32, 64), attention=(True, False), heads=(4, 4), layers_per_block=1,
                  context_width=16)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def computed(way: Way[Any], layer: Any, x: Tensor, to: Tensor | None = None) -> Tensor:
    weight = layer.weight if way.prepare is None else way.prepare(layer, layer.weight, x)
    return way.plus(layer, x, weight, to)


def usable(way: Way[Any], dtype: torch.dtype) -> None:
    if way.private and not onednn_computes(dtype):
        pytest.skip(f"no packed {dtype} on this processor")


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true.double()).abs().max() / true.double().abs().max())


@cache
def linear(rows: int, source: int, width: int, bias: bool) -> tuple[nn.Linear, Tensor, Tensor]:
    """A layer, its input and what it says."""
    layer, x = nn.Linear(source, width, bias=bias), torch.randn(1, rows, source)
    return layer, x, layer(x)


@cache
def convolution(
    source: int, width: int, side: int, kernel: int, stride: int, padding: int
) -> tuple[nn.Conv2d, Tensor, Tensor]:
    """A layer of some kernel, stride and padding, its input and what it says."""
    layer, x = nn.Conv2d(source, width, kernel, stride, padding), torch.randn(2, source, side, side)
    return layer, x, layer(x)


# Rows, channels in and out: a small one, and SD 1.5's time embedding, keys of a prompt, and feed-forward.
@pytest.mark.parametrize("shape", [(7, 9, 5), (2, 1280, 1280), (154, 768, 640), (64, 640, 5120)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", LINEAR, ids=lambda way: way.name)
def test_linear_layers(way: Way[nn.Linear], shape: tuple[int, int, int], bias: bool) -> None:
    usable(way, torch.float32)
    layer, x, true = linear(*shape, bias)
    found, to = computed(way, layer, x), true.flip(1)
    assert found.shape == true.shape
    assert error(found, true) < EXACT
    assert error(computed(way, layer, x, to), true + to) < EXACT


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", GATED, ids=lambda way: way.name)
def test_gated_layers(way: Way[nn.Linear], bias: bool) -> None:
    usable(way, torch.float32)
    layer, x = nn.Linear(320, 2560, bias=bias), torch.randn(2, 64, 320)
    assert error(computed(way, layer, x), gated(layer, x)) < EXACT


def test_a_gate_in_one_pass_rounds_less() -> None:
    """In bfloat16: hidden, gate and its GELU are rounded once together, not one after the other."""
    way = next(way for way in GATED if way.name == "fused")
    usable(way, torch.bfloat16)
    layer, x = nn.Linear(320, 2560).bfloat16(), torch.randn(256, 320).bfloat16()
    true = gated(copy.deepcopy(layer).double(), x.double())
    own, usual = ((y.double() - true).square().mean() for y in (computed(way, layer, x), gated(layer, x)))
    assert own < usual


# Channels in and out, side of the map, kernel, stride, padding: the last are SD 1.5's at 16x16 and 8x8.
@pytest.mark.parametrize(
    "shape",
    [(5, 7, 9, 3, 1, 1), (8, 8, 9, 3, 2, 1), (8, 6, 10, 3, 2, 0), (6, 8, 1, 1, 1, 0), (640, 640, 16, 3, 1, 1),
     (1280, 1280, 8, 3, 1, 1), (960, 640, 16, 1, 1, 0)],
)  # fmt: skip
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("way", CONVOLUTION, ids=lambda way: way.name)
def test_convolutions(way: Way[nn.Conv2d], shape: tuple[int, ...], layout: torch.memory_format) -> None:
    usable(way, torch.float32)
    layer, x, true = convolution(*shape)
    if not way.usable(layer, x):
        tiles = TILES[torch.float32]  # the others are for bfloat16
        unfit = way.name == "winograd" and (shape[3:5] != (3, 1) or way.growth != tiles.growth)
        assert unfit or (way.name == "channels_last" and x.shape[2:] == (1, 1))  # the same order as the usual one
        return
    x, to = (t.contiguous(memory_format=layout) for t in (x, true.flip(0)))
    assert error(computed(way, layer, x), true) < EXACT
    assert error(computed(way, layer, x, to), true + to) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", [*LINEAR, *CONVOLUTION], ids=lambda way: way.name)
def test_half_types_err_no_more_than_plain_layers(way: Way[Any], dtype: torch.dtype) -> None:
    usable(way, dtype)
    layer: nn.Module = nn.Linear(256, 64) if way in LINEAR else nn.Conv2d(32, 64, 3, padding=1)
    x = torch.randn(2, 64, 256) if way in LINEAR else torch.randn(2, 32, 16, 16)
    half, own = copy.deepcopy(layer).to(dtype), x.to(dtype)
    if not way.usable(half, own):
        pytest.skip("for another type")
    true = copy.deepcopy(half).double()(own.double())
    more = 4 if way.name == "winograd" else 1.3  # see test_winograd.py
    assert error(computed(way, half, own), true) <= more * error(half(own), true)


@pytest.mark.parametrize("shape", [(1, 2, 9, 9, 8), (2, 8, 256, 77, 40), (2, 10, 256, 256, 64), (1, 1, 300, 300, 512)])
@pytest.mark.parametrize("rows", [1, 64, 10**6])
def test_attention_by_blocks(shape: tuple[int, ...], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, heads, queries, keys, width = shape
    monkeypatch.setattr(attention_module, "BLOCK_BYTES", 4 * rows * keys)
    q, k, v = (torch.randn(batch, n, heads, width).transpose(1, 2) for n in (queries, keys, keys))
    assert error(attention_by_blocks(q, k, v), attention(q, k, v)) < EXACT


@pytest.mark.parametrize(("fits", "calls"), [(4 * 32, 2 * 8), (32 * 32, 2), (2 * 32 * 32, 1)])
def test_blocks_bound_what_attention_holds(fits: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads of 32 queries and keys: some queries at a time, a head at a time, both together."""
    monkeypatch.setattr(attention_module, "BLOCK_BYTES", 4 * fits)
    seen: list[int] = []
    softmax = torch.softmax

    def noted(scores: Tensor, dim: int, *, out: Tensor) -> Tensor:
        seen.append(scores.numel())
        return softmax(scores, dim, out=out)

    monkeypatch.setattr(torch, "softmax", noted)
    attention_by_blocks(*(torch.randn(1, 2, 32, 8) for _ in range(3)))
    assert len(seen) == calls and max(seen) <= fits


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_blocks_in_bfloat16_are_off_by_its_rounding(spread: float) -> None:
    """Fused attention keeps scores in float32, the product gives them rounded, by up to 2**-9 of their size.

    As large is the relative error of the shares, to which their own rounding and that of the answer come.
    """
    q, k, v = (torch.randn(2, 8, 256, 40) * s for s in (spread, spread, 1.0))
    halves = [t.bfloat16() for t in (q, k, v)]
    true = attention(halves[0].double(), halves[1].double(), halves[2].double())
    found = attention_by_blocks(halves[0], halves[1], halves[2]).double()
    relative = float((found - true).square().mean().sqrt() / true.square().mean().sqrt())
    assert relative < (2 + spread**2) * 2**-9


def test_a_network_in_bfloat16_errs_as_with_fused_attention() -> None:
    """Against the same weights in float32, over the whole network: what every layer rounds outweighs the scores."""
    unet = UNet(UNET).requires_grad_(False).eval()
    for p in unet.parameters():
        p.data = (torch.randn(p.shape) / p[0].numel() ** 0.5 if p.ndim > 1 else p.data).bfloat16()
    true = asked(copy.deepcopy(unet).float())
    x, time, context = inputs()
    errors = {}
    for name, way in ATTENTION.items():
        for module in unet.modules():
            if isinstance(module, attention_module.Attention):
                module.attend = way
        found = unet(x.bfloat16(), time, context.bfloat16())
        errors[name] = float((found.float() - true).square().mean())
    assert errors["blocks"] <= 1.3**2 * errors["fused"], errors


# The capability check


def test_operators_that_are_gone_or_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> Tensor:
        raise AttributeError("no such operator")

    for broken in (gone, lambda layer, x: layer.weight.new_zeros(layer.weight.shape)):
        onednn_computes.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(ways, "_packed_linear", broken)
            assert not onednn_computes(torch.float32)
    onednn_computes.cache_clear()
    assert not onednn_computes(torch.float64)


# Forms


class Recording:
    """Computes layers as usual and notes that it did."""

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self.attended = self.gates = self.sums = 0

    def linear(self, layer: nn.Linear, x: Tensor, to: Tensor | None = None) -> Tensor:
        self.layers.append(layer)
        return self.added(F.linear(x, layer.weight, layer.bias), to)

    def convolution(self, layer: nn.Conv2d, x: Tensor, to: Tensor | None = None) -> Tensor:
        self.layers.append(layer)
        return self.added(F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding), to)

    def added(self, y: Tensor, to: Tensor | None) -> Tensor:
        self.sums += to is not None
        return y if to is None else to + y

    def gated(self, layer: Layer, x: Tensor) -> Tensor:
        self.gates += 1
        return gated(layer, x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.attended += 1
        return attention(q, k, v)


@pytest.fixture
def unet(monkeypatch: pytest.MonkeyPatch) -> UNet:
    monkeypatch.setattr(ways, "LEAST", 1)
    return UNet(UNET).requires_grad_(False).eval()


def asked(unet: nn.Module) -> Tensor:
    answer: Tensor = unet(*inputs())
    return answer


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 5, 16, generator=random)
    x, context = x.bfloat16().float(), context.bfloat16().float()  # so that both types are asked the same
    return x, torch.tensor([500.0, 500.0]), context


def test_every_layer_of_a_unet_is_chosen_and_shares_its_weights(unet: UNet) -> None:
    before, recording = asked(unet), Recording()
    form = chosen(unet, recording)
    assert torch.equal(asked(form), before)
    layers = [m for m in unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert {id(layer.weight) for layer in recording.layers} == {id(layer.weight) for layer in layers}
    assert recording.attended == sum(isinstance(m, attention_module.Attention) for m in unet.modules())
    assert recording.gates == sum(isinstance(m, attention_module.GEGLU) for m in unet.modules())
    # Two attentions and the feed-forward of each block, the last projection around it; each residual block.
    blocks = sum(isinstance(m, attention_module.SpatialTransformer) for m in unet.modules())
    assert recording.sums == 4 * blocks + sum(isinstance(m, ResnetBlock) for m in unet.modules())
    assert all(a is b for a, b in zip(unet.parameters(), form.parameters(), strict=True))
    seen = len(recording.layers)
    assert torch.equal(asked(unet), before) and len(recording.layers) == seen  # the network itself is as it was


def test_a_transformer_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "LEAST", 1)
    config = MMDiTConfig(
        layers=2, heads=2, head_width=16, context_width=16, vector_width=8, positions=8, base_positions=4
    )
    network = MMDiT(config).requires_grad_(False).eval()
    given = torch.randn(1, 16, 8, 8), torch.tensor([500.0]), torch.randn(1, 5, 16), torch.randn(1, 8)
    recording = Recording()
    assert torch.equal(chosen(network, recording)(*given), network(*given))
    assert recording.attended == 2 and recording.layers


def test_small_trained_packed_and_seamless_layers_stay(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording()
    kinds = (ChosenLinear, ChosenConv2d)
    wrapped = chosen(seamless(unet, "both"), recording)
    assert torch.equal(asked(wrapped), asked(seamless(unet, "both")))
    assert all(layer.padding == (0, 0) for layer in recording.layers if isinstance(layer, nn.Conv2d))
    trained = UNet(UNET)
    assert not any(isinstance(m, kinds) for m in chosen(trained, recording).modules())
    monkeypatch.setattr(ways, "LEAST", 10**9)
    assert not any(isinstance(m, kinds) for m in chosen(unet, recording).modules())


def test_packed_weights_of_files_stay_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "LEAST", 1)
    packed = QuantisedTensor(torch.randn(4, 8).to(torch.float8_e4m3fn), "F8_E4M3", (4, 8))
    network = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)).requires_grad_(False)
    network[0].register_parameter("weight", nn.Parameter(PackedTensor.of(packed), requires_grad=False))
    form = chosen(network, Recording())
    assert type(form[0]) is nn.Linear and isinstance(form[1], ChosenLinear)


@pytest.mark.parametrize("way", ["merge", "branch"])
def test_loras_go_on_top(unet: UNet, way: Any) -> None:
    """A form of the form: merged weights and the layers beside which a LoRA stands are computed by the chooser, too."""
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    random = torch.Generator().manual_seed(3)
    delta = LoRA.fresh((32, 32), 4, 4.0).mapped(lambda t: torch.randn(t.shape, generator=random))
    recording = Recording()
    on_top = changed(chosen(unet, recording), {path: [(delta, 0.5)]}, way)
    assert torch.equal(asked(on_top), asked(changed(unet, {path: [(delta, 0.5)]}, way)))
    assert on_top.get_submodule(path) in recording.layers
    assert not torch.equal(asked(on_top), asked(unet))
