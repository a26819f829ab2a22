"""Recorded evaluations: what is recorded and when; the recording itself needs CUDA (tests/gpu)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reverie.engine.recording import MOST, Recorded
from reverie.types import Taps
from tests.nets.test_unet import made


class Recorder:
    """Keeps what it is asked to record and answers by running it."""

    def __init__(self) -> None:
        self.taps: list[Taps] = []

    def __call__(self, network: nn.Module, given: Mapping[str, Tensor], taps: Taps) -> Any:
        self.taps.append(taps)
        return lambda now: network(**now, taps=taps)


def inputs(batch: int = 2, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, size, size), torch.full((batch,), 300.0), torch.randn(batch, 7, 16)


def test_one_recording_for_each_shape_and_number_of_copies() -> None:
    network, recorder = made(), Recorder()
    run = Recorded(network, recorder)
    for given in (inputs(), inputs(), inputs()):
        assert torch.equal(run(*given), network(*given))
    assert len(recorder.taps) == 1
    same = inputs()
    same[0][1] = same[0][0]
    assert torch.equal(run(*same, taps=Taps(copies=2)), network(*same, Taps(copies=2)))
    assert [taps.copies for taps in recorder.taps] == [1, 2]


def test_tapped_evaluations_run_as_they_are() -> None:
    network, recorder, given = made(), Recorder(), inputs()
    run = Recorded(network, recorder)
    taps = Taps(bypass=frozenset(path for path, _ in network.named_modules() if path.endswith("transformer_blocks.0")))
    assert torch.equal(run(*given, taps=taps), network(*given, taps))
    assert not torch.equal(run(*given, taps=taps), network(*given))
    assert not recorder.taps


def test_the_oldest_recording_goes() -> None:
    network, recorder = made(), Recorder()
    run = Recorded(network, recorder)
    for size in (*range(8, 8 + MOST + 1), 8):
        run(*inputs(size=size))
    assert len(recorder.taps) == MOST + 2
