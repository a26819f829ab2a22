"""T5's encoder: distances, precision."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.nets.t5 import GatedFeedForward, T5Config, T5Encoder, position_buckets

TINY = T5Config(vocab_size=50, width=32, inner_width=48, layers=3, heads=2, head_width=8)


def made(config: T5Config = TINY) -> T5Encoder:
    torch.manual_seed(0)
    return T5Encoder(config).eval().requires_grad_(False)


def ids(length: int = 40, batch: int = 2) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def test_the_true_size_has_the_published_number_of_parameters() -> None:
    """4,762,310,656: the encoder of google/t5-v1_1-xxl, 9.52 GB in 16 bits."""
    with torch.device("meta"):
        network = T5Encoder(T5Config())
    assert sum(p.numel() for p in network.parameters()) == 4_762_310_656


def test_near_distances_have_buckets_of_their_own() -> None:
    """32 buckets: 16 a direction, distances 0 to 7 alone; the token itself is bucket 0, those ahead have 16 more."""
    found = position_buckets(20, 32, 128)
    assert found[10, 3:18].tolist() == [7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23]


def test_far_distances_share_buckets_up_to_the_last() -> None:
    behind = position_buckets(300, 32, 128)[-1].flip(0).tolist()  # by distance
    ahead = position_buckets(300, 32, 128)[0].tolist()
    assert ahead[1:] == [b + 16 for b in behind[1:]]
    firsts = [behind.index(bucket) for bucket in range(16)]
    # 8 * 16^(k/8), rounded up: equal steps of the logarithm from 8 to 128 in eight buckets.
    assert firsts == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    assert all(a <= b for a, b in itertools.pairwise(behind))


def test_equal_tokens_get_equal_answers() -> None:
    """Position changes who is read, not what: where all tokens are one, it changes nothing."""
    network = made()
    same = torch.full((1, 9), 7)
    answer = network(same)
    torch.testing.assert_close(answer, answer[:, :1].expand_as(answer))


def test_padding_is_read() -> None:
    """Stable Diffusion 3 was trained without a mask."""
    network, words = made(), ids(6, 1)
    padded = torch.cat([words, torch.zeros(1, 4, dtype=torch.int64)], dim=1)
    assert (network(padded)[:, :6] - network(words)).abs().max() > 1e-3


def test_later_tokens_are_seen() -> None:
    network, words = made(), ids(6, 1)
    changed = words.clone()
    changed[0, 5] = (changed[0, 5] + 1) % TINY.vocab_size
    assert (network(changed)[0, 0] - network(words)[0, 0]).abs().max() > 1e-4


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 10), (torch.bfloat16, 7)])
def test_half_precision_stays_near(dtype: torch.dtype, bits: int) -> None:
    """Within 16 times the rounding of the format, over three layers."""
    network = made()
    want = network(ids())
    half = network.to(dtype)(ids())
    assert half.dtype == dtype
    assert (half.float() - want).abs().max() < 16 * 2.0 ** -(bits + 1) * want.abs().max()


def overflowing() -> T5Encoder:
    """A feed-forward whose sums outgrow float16, as T5 XXL's do, with weights and inputs well inside it."""
    network = made()
    for block in range(TINY.layers):
        network.get_parameter(f"encoder.block.{block}.layer.1.DenseReluDense.wo.weight").mul_(4e5)
    return network


def test_sums_beyond_float16_do_not_overflow() -> None:
    network = overflowing()
    want = network(ids())
    half = network.half()
    last = half.get_submodule(f"encoder.block.{TINY.layers - 1}.layer.1.DenseReluDense")
    assert isinstance(last, GatedFeedForward)
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = last.register_forward_hook(lambda _module, given, result: seen.extend([given[0], result]))
        got = half(ids())
        handle.remove()
        hidden = F.gelu(last.wi_0(seen[0]), approximate="tanh") * last.wi_1(seen[0])
    assert hidden.isfinite().all()
    assert not last.wo(hidden).isfinite().all(), "the plain float16 product overflows: the test means something"
    assert seen[1].abs().max() > torch.finfo(torch.float16).max
    assert got.isfinite().all()
    assert (got.float() - want).abs().max() < 0.02 * want.abs().max()
