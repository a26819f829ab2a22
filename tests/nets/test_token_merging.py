"""Token merging against the paper's algorithm, written again token by token in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.nets.test_unet import made
from torch import Tensor

from reverie.engine.caching import merged_blocks
from reverie.nets.token_merging import TokenMerging, divided
from reverie.types import Taps

Array = np.ndarray


def restated(tokens: Array, rows: int, columns: int, ratio: float, stride: int) -> tuple[list[int], dict[int, int]]:
    """Bolya & Hoffman 2023, section 4 (and 2022, section 3): the sources that are kept, and who goes into whom.

    The target of each square is its first token. The sources most like a target are merged into it.
    """
    whole = [(r, c) for r in range(rows // stride * stride) for c in range(columns // stride * stride)]
    targets = [r * columns + c for r, c in whole if r % stride == 0 and c % stride == 0]
    sources = [n for n in range(rows * columns) if n not in set(targets)]
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    best = {s: max(targets, key=lambda t: float(unit[s] @ unit[t])) for s in sources}
    order = sorted(sources, key=lambda s: -float(unit[s] @ unit[best[s]]))
    count = min(int(rows * columns * ratio), len(sources))
    return order[count:], {s: best[s] for s in order[:count]}


def attended(x: Array) -> Array:
    """Something that mixes all tokens, as attention does: softmax of their products over their sum."""
    scores = np.exp(x @ x.T / x.shape[1])
    return np.asarray(scores / scores.sum(1, keepdims=True) @ x)


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (7, 5)])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_equals_the_algorithm(rows: int, columns: int, ratio: float, stride: int) -> None:
    """Within float32's rounding; sizes that squares do not divide, too."""
    tokens, x = (torch.randn(2, rows * columns, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))
    merging = TokenMerging(tokens, rows, columns, ratio, stride)
    fewer = merging.merge(x)
    found = merging.unmerge(torch.stack([torch.from_numpy(attended(row.double().numpy())).float() for row in fewer]))
    for own, row, answer, short in zip(tokens, x.double().numpy(), found, fewer, strict=True):
        kept, into = restated(own.double().numpy(), rows, columns, ratio, stride)
        targets = sorted(set(range(rows * columns)) - set(kept) - set(into))
        means = [row[[t, *(s for s in into if into[s] == t)]].mean(0) for t in targets]
        merged = np.stack([*(row[s] for s in kept), *means])
        assert np.abs(short.numpy() - merged).max() < 1e-5
        answers = dict(zip([*kept, *targets], attended(merged), strict=True))
        answers |= {source: answers[target] for source, target in into.items()}
        expected = np.stack([answers[n] for n in range(rows * columns)])
        assert np.abs(answer.numpy() - expected).max() < 1e-5


@given(st.integers(2, 9), st.integers(2, 9), st.floats(0, 0.99), st.integers(2, 3), st.booleans())
@settings(max_examples=60)
def test_every_token_comes_back_once(rows: int, columns: int, ratio: float, stride: int, random: bool) -> None:
    """What is kept comes back as it was, what is merged as its target's mean; nothing is left unset."""
    count = rows * columns
    tokens = torch.randn(1, count, 4, generator=torch.Generator().manual_seed(0))
    merging = TokenMerging(tokens, rows, columns, ratio, stride, torch.Generator().manual_seed(3) if random else None)
    targets, sources = merging.targets, merging.sources
    assert sorted([*targets.tolist(), *sources.tolist()]) == list(range(count))
    assert len(targets) == (rows // stride) * (columns // stride)
    fewer = merging.merge(tokens)
    gone = min(int(count * ratio), len(sources)) if len(targets) else 0
    assert fewer.shape[1] == count - gone
    back = merging.unmerge(fewer)
    moved = int(((back - tokens).abs().amax(-1) > 1e-6).sum())
    assert moved <= 2 * gone
    assert torch.isfinite(back).all()
    # a sum over tokens in which each stands for those merged into it is what it was
    weights = merging.merge(torch.ones_like(tokens))
    assert torch.allclose(weights, torch.ones_like(weights))


def test_random_targets_are_one_a_square_and_the_seeds() -> None:
    places = [divided(8, 6, 2, torch.Generator().manual_seed(seed))[0].tolist() for seed in (1, 1, 2)]
    assert places[0] == places[1] != places[2]
    assert len({(p // 6 // 2, p % 6 // 2) for p in places[2]}) == 12


def test_in_a_network_nothing_merged_changes_nothing() -> None:
    """In the same bits; where tokens are merged the answer is another, of the same shape."""
    network = made(attention=(1, 1))
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([300.0, 300.0]), torch.randn(2, 5, 16)
    paths = merged_blocks(network, 1)
    assert paths and all(path.startswith(("down_blocks.0.", "up_blocks.1.")) for path in paths)

    def taps(ratio: float) -> Taps:
        def tap(tokens: Tensor):  # type: ignore[no-untyped-def]
            merging = TokenMerging(tokens, 8, 8, ratio, 2)
            return merging.merge, merging.unmerge

        return Taps(merging=dict.fromkeys(paths, tap))

    whole = network(x, t, context)
    nothing, half = network(x, t, context, taps(0.0)), network(x, t, context, taps(0.5))
    assert torch.allclose(nothing, whole, atol=1e-5)  # the order of keys changes the order of sums
    assert half.shape == whole.shape
    assert 1e-4 < (half - whole).abs().max() < 1
