"""Names of layers, and what taps do at them."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.errors import RequestError
from reverie.nets.attention import Attention
from reverie.nets.unet import UNet, UNetConfig
from reverie.sampling.tapping import Layout, blurred, grid, identity, recording, short, smoothed
from reverie.types import Taps
from tests.sampling import network

MID = "mid_block.attentions.0.transformer_blocks.0.attn1"
LAYOUT = Layout.of(network.unet())


def sd1_layout() -> Layout:
    with torch.device("meta"):
        return Layout.of(UNet(UNetConfig()))


def test_layout_of_stable_diffusion_1() -> None:
    layout = sd1_layout()
    assert len(layout.self_attention) == len(layout.blocks) == 16  # 6 down, 1 in the middle, 9 up
    assert layout.up_blocks == tuple(f"up_blocks.{i}" for i in range(4))
    assert layout.channels == 320


@pytest.mark.parametrize(
    ("names", "count", "first"),
    [
        ("mid", 1, "mid.0.0.attn1"),
        ("mid.0.attn1", 1, "mid.0.0.attn1"),
        (MID, 1, "mid.0.0.attn1"),
        ("mid_block", 1, "mid.0.0.attn1"),
        ("down.1", 2, "down.1.0.0.attn1"),
        ("down.1.1", 1, "down.1.1.0.attn1"),
        ("down_blocks.1.attentions.1", 1, "down.1.1.0.attn1"),
        ("up", 9, "up.1.0.0.attn1"),
        ("up.3+mid", 4, "mid.0.0.attn1"),
        ("up.3, mid down.0.0", 5, "down.0.0.0.attn1"),
        ("mid+mid", 1, "mid.0.0.attn1"),
    ],
)
def test_names_mean_layers(names: str, count: int, first: str) -> None:
    paths = sd1_layout().attention_at(names)
    assert len(paths) == count
    assert short(paths[0]) == first


def test_a_number_is_a_block_of_a_transformer() -> None:
    paths = tuple(f"transformer_blocks.{i}" for i in range(24))
    assert Layout((), paths, ()).blocks_at("1+7") == ("transformer_blocks.1", "transformer_blocks.7")


@pytest.mark.parametrize("names", ["down.3", "down.10", "middle", "", "mid+nowhere", "mid.0.attn2", "mi", "up.1.0.5"])
def test_what_is_not_there_is_named_with_what_is(names: str) -> None:
    with pytest.raises(RequestError, match=r"no self-attention layer .* there are down\.0\.0, .*mid") as error:
        sd1_layout().attention_at(names)
    assert "\n" not in str(error.value)


def test_a_network_without_attention_says_so() -> None:
    with pytest.raises(RequestError, match="there are none"):
        Layout.of(torch.nn.Linear(1, 1)).blocks_at("mid")


def ask(taps: Taps | None = None, *, batch: int = 2) -> Tensor:
    given = network.cond(1, batch)
    x = torch.cat([network.noise(batch), network.draw(batch, 4, 8, 8, seed=9)], dim=1)
    answer: Tensor = network.unet()(x, torch.full((batch,), 300.0), given.context, taps)
    return answer


def layer() -> Attention:
    found = network.unet().get_submodule(MID)
    assert isinstance(found, Attention)
    return found


def test_recording_changes_nothing_and_keeps_the_weights() -> None:
    maps: dict[str, Tensor] = {}
    got = ask(recording(frozenset({MID}), maps))
    assert torch.equal(got, ask())
    assert maps[MID].shape == (2, 16, 16)
    torch.testing.assert_close(maps[MID].sum(-1), torch.ones(2, 16))
    assert maps[MID].std() > 0.01


def test_a_layer_that_runs_twice_is_refused() -> None:
    taps = recording(frozenset({MID}), {})
    ask(taps)
    with pytest.raises(RequestError, match="tiles"):
        ask(taps)


def test_identity_is_attention_with_an_identity_matrix() -> None:
    at = layer()
    x = network.draw(2, 16, 32, seed=4)
    want = at.to_out[0](at.to_v(x))
    assert torch.equal(identity(at, x, None, lambda: x), want)
    assert not torch.allclose(want, at(x), atol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 6)])
def test_smoothed_queries_are_smoothed_attention_logits(rows: int, columns: int) -> None:
    """Hong 2024: to blur the queries is to blur the logits over the queries' places, as the two are linear."""
    at = layer()
    x = network.draw(1, rows * columns, 32, seed=4)
    q, k, v = (at.split(f(x)) for f in (at.to_q, at.to_k, at.to_v))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    maps = logits.transpose(-1, -2).reshape(1, -1, rows, columns)  # (heads * keys) maps over the queries' places
    smooth = blurred(maps, 0.8).reshape(logits.shape).transpose(-1, -2)
    want = at.merged(smooth.softmax(-1) @ v)
    got = smoothed(0.8, 2 * rows, 2 * columns)(at, x, None, lambda: x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_infinitely_smoothed_queries_all_see_the_same() -> None:
    got = smoothed(float("inf"), 8, 8)(layer(), network.draw(1, 16, 32, seed=4), None, Tensor)
    torch.testing.assert_close(got, got[:, :1].expand_as(got))


@pytest.mark.parametrize(
    ("tokens", "size", "want"),
    [(64, (8, 8), (8, 8)), (16, (8, 8), (4, 4)), (15, (10, 6), (5, 3)), (6, (9, 6), (3, 2)), (15, (9, 6), (5, 3))],
)
def test_grid(tokens: int, size: tuple[int, int], want: tuple[int, int]) -> None:
    assert grid(tokens, *size) == want


def test_tokens_that_are_no_grid_are_refused() -> None:
    with pytest.raises(RequestError, match="17 tokens"):
        grid(17, 8, 8)


def test_blur_is_a_convolution_with_a_gaussian() -> None:
    x = network.draw(2, 3, 12, 10, seed=8)
    offsets = torch.arange(-4, 5).float()
    kernel = torch.exp(-0.5 * (offsets / 1.3) ** 2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    want = F.conv2d(F.pad(x, (4, 4, 4, 4), mode="reflect"), kernel.expand(3, 1, 9, 9), groups=3)
    torch.testing.assert_close(blurred(x, 1.3, 4), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3)])
def test_blur_of_small_maps(size: tuple[int, int]) -> None:
    x = torch.ones(1, 2, *size)
    torch.testing.assert_close(blurred(x, 1.0, 4), x)


def test_no_blur() -> None:
    x = network.draw(1, 2, 4, 4, seed=1)
    assert torch.equal(blurred(x, 0.0), x)


def test_threads_with_different_taps_do_not_meet() -> None:
    """Two requests on one network at once: each gets what it gets alone, to the last bit."""
    kinds = [
        None,
        Taps(attention=dict.fromkeys(LAYOUT.self_attention, identity)),
        Taps(bypass=frozenset(LAYOUT.blocks)),
    ]
    want = [ask(taps) for taps in kinds]
    assert not torch.allclose(want[0], want[1], atol=1e-4)
    assert not torch.allclose(want[1], want[2], atol=1e-4)
    wrong: list[int] = []
    barrier = threading.Barrier(len(kinds))

    def many(kind: int) -> None:
        barrier.wait()
        wrong.extend(kind for _ in range(10) if not torch.equal(ask(kinds[kind]), want[kind]))

    threads = [threading.Thread(target=many, args=(kind,)) for kind in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
