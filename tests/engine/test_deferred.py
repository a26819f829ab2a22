"""Tensors without numbers behave as those with numbers, and read them only when they are asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reverie.checkpoint.save import write_weights
from reverie.checkpoint.source import open_weights
from reverie.engine.deferred import Deferred, DeferredFile, now

WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda t: t,
    "transposed": lambda t: t.t(),
    "a part": lambda t: t.chunk(3)[1],
    "halves swapped": lambda t: torch.cat(t.chunk(2)[::-1]),
    "as a convolution": lambda t: t[:, :, None, None],
    "and back": lambda t: t[:, :, None, None].flatten(1),
    "twice": lambda t: torch.cat([t, t.t().t()]).half(),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_what_is_done_to_the_shape_is_done_to_the_numbers(way: Callable[[Tensor], Tensor]) -> None:
    numbers, reads = torch.arange(24.0).reshape(6, 4), 0

    def load() -> Tensor:
        nonlocal reads
        reads += 1
        return numbers

    later, expected = way(Deferred.of((6, 4), torch.float32, load)), way(numbers)
    assert (later.shape, later.dtype, later.ndim, len(later)) == (
        expected.shape, expected.dtype, expected.ndim, len(expected),
    )  # fmt: skip
    assert reads == 0
    assert torch.equal(now(later), expected) and reads > 0


def test_a_file_is_read_when_its_tensors_are(tmp_path: Path) -> None:
    write_weights(tmp_path / "a.safetensors", {"a": torch.ones(2, 3)})
    file = DeferredFile.of(open_weights(tmp_path / "a.safetensors"))
    later = file.weight("a")
    assert later.is_meta and later.dtype == torch.float32
    assert torch.equal(now(later.half()), torch.ones(2, 3, dtype=torch.float16))
    assert torch.equal(now(torch.ones(2)), torch.ones(2))
