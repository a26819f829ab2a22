"""Ready weights: made once, gone with what they were made of, never more than there is room for."""

import gc

import torch
from torch import Tensor

from reverie.engine.packs import PATIENCE, Packs

SIZE = 4 * 16  # bytes of a weight


def weights(count: int) -> list[Tensor]:
    return [torch.full((16,), float(i)) for i in range(count)]


def wanted(packs: Packs, source: Tensor, shape: str = "small") -> Tensor | None:
    found = packs.get(source, shape, lambda: source + 1)
    assert found is None or isinstance(found, Tensor)
    return found


def test_a_weight_is_made_once_for_each_shape() -> None:
    packs, (source,) = Packs(lambda: 10 * SIZE), weights(1)
    first = wanted(packs, source)
    assert first is not None and torch.equal(first, source + 1)
    assert wanted(packs, source) is first
    assert wanted(packs, source, "large") is not first
    assert wanted(packs, source) is first and packs.size == 2 * SIZE


def test_room_is_asked_for_what_a_weight_grows_to() -> None:
    packs, (source,) = Packs(lambda: 3 * SIZE), weights(1)
    assert packs.get(source, "small", lambda: source.repeat(4), 4.0) is None
    assert packs.get(source, "small", lambda: source.repeat(3), 3.0) is not None and packs.size == 3 * SIZE


def test_equal_weights_are_not_the_same() -> None:
    packs, one, other = Packs(lambda: 10 * SIZE), torch.ones(16), torch.ones(16)
    assert wanted(packs, one) is not wanted(packs, other)


def test_what_was_made_goes_with_its_weight() -> None:
    packs, (source,) = Packs(lambda: 10 * SIZE), weights(1)
    wanted(packs, source)
    del source
    gc.collect()
    assert packs.size == 0


def test_a_weight_that_was_changed_is_made_anew() -> None:
    packs, (source,) = Packs(lambda: 10 * SIZE), weights(1)
    wanted(packs, source)
    source += 5
    found = wanted(packs, source)
    assert found is not None and torch.equal(found, source + 1)
    source.data = torch.zeros(16)
    found = wanted(packs, source)
    assert found is not None and torch.equal(found, torch.ones(16)) and packs.size == SIZE


def test_weights_that_were_made_for_inference_alone() -> None:
    with torch.inference_mode():
        packs, (source,) = Packs(lambda: 10 * SIZE), weights(1)
        assert wanted(packs, source) is wanted(packs, source)


def test_no_more_than_there_is_room_for_and_what_is_used_stays() -> None:
    """Two of three fit: whoever came first stays, however often the third is wanted."""
    packs, sources = Packs(lambda: 2 * SIZE), weights(3)
    for _ in range(5 * PATIENCE):
        found = [wanted(packs, source) is not None for source in sources]
        assert found == [True, True, False]
        assert packs.size == 2 * SIZE


def test_what_nobody_wants_any_more_gives_way() -> None:
    packs, sources = Packs(lambda: 2 * SIZE), weights(2)
    for source in sources:
        wanted(packs, source, "small")
    for number in range(PATIENCE + 1):
        found = [wanted(packs, source, "large") for source in sources]
        assert all(weight is None for weight in found) == (number < PATIENCE)
    assert all(weight is not None for weight in found) and packs.size == 2 * SIZE


def test_the_budget_is_asked_when_it_is_needed() -> None:
    asked: list[int] = []
    packs = Packs(lambda: asked.append(1) or SIZE)  # type: ignore[func-returns-value]
    assert not asked
    for source in (sources := weights(3)):
        wanted(packs, source)
    assert len(asked) == 1 and packs.size == SIZE and len(sources) == 3


def test_packed_layers_are_counted() -> None:
    packs, source = Packs(lambda: 1 << 20), torch.randn(64, 64)
    packed = packs.get(source, "rows", lambda: torch.ops.mkldnn._reorder_linear_weight(source, 32))
    assert isinstance(packed, Tensor) and packed.is_mkldnn
    assert packs.size >= source.nbytes


def test_a_weight_in_two_parts_is_counted_whole() -> None:
    packs, (source,) = Packs(lambda: 10 * SIZE), weights(1)
    found = packs.get(source, "parts", lambda: source.chunk(2))
    assert isinstance(found, tuple) and len(found) == 2 and packs.size == SIZE
