"""Evaluations of a network recorded as CUDA graphs: hundreds of kernels started by one call.

A small network's kernels end sooner than Python starts the next ones; a recording leaves Python out. It holds for one
shape of all inputs and for the weights where they lie.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reverie.types import Taps

MOST = 2  # recordings that are kept: with guidance and without it; each holds the memory of one evaluation
WARM = 3  # evaluations before one is recorded: libraries choose kernels, regions are compiled (torch's documentation)

Shape = tuple[torch.Size, torch.dtype]
Key = tuple[int, tuple[tuple[str, Shape], ...]]


@dataclass(frozen=True, eq=False)
class Recording:
    """One evaluation: where its inputs are read, where its answer is written."""

    graph: torch.cuda.CUDAGraph
    inputs: Mapping[str, Tensor]
    answer: Tensor

    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        """Run it on other numbers."""
        for name, place in self.inputs.items():
            place.copy_(given[name])
        self.graph.replay()
        return self.answer.clone()


class Recorded:
    """A network on CUDA whose evaluations are recorded when they are first asked for.

    Where an evaluation is tapped it runs as it is. Keys and values of the prompt are computed in the recording itself,
    which thereby serves every prompt.
    """

    def __init__(self, network: nn.Module, record: Callable[..., Recording] | None = None) -> None:
        self._network, self._record = network, record or recorded
        self._known: dict[Key, Recording] = {}

    def __call__(
        self, x: Tensor, timesteps: Tensor, context: Tensor, *, taps: Taps | None = None, **named: Tensor
    ) -> Tensor:
        """As the network."""
        given = {"x": x, "timesteps": timesteps, "context": context, **named}
        copies = _copies(taps)
        if copies is None:
            answer: Tensor = self._network(**given, taps=taps)
            return answer
        key = copies, tuple((name, (t.shape, t.dtype)) for name, t in given.items())
        if key not in self._known:
            if len(self._known) == MOST:
                del self._known[next(iter(self._known))]
            self._known[key] = self._record(self._network, given, Taps(copies=copies))
        return self._known[key](given)


def _copies(taps: Taps | None) -> int | None:
    """`Taps.copies`; None where an evaluation is tapped."""
    if taps is None:
        return 1
    tapped = taps.attention or taps.bypass or taps.skips or taps.added or taps.features or taps.beyond or taps.merging
    return None if tapped else taps.copies


def recorded(network: nn.Module, given: Mapping[str, Tensor], taps: Taps) -> Recording:
    """Record one evaluation of a network whose weights stay where they are."""
    inputs = {name: t.clone() for name, t in given.items()}
    here = torch.cuda.current_stream()
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for _ in range(WARM):
            network(**inputs, taps=taps)
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = network(**inputs, taps=taps)
    return Recording(graph, inputs, answer)
