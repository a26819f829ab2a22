"""Several devices that train together, through accelerate: each takes its share of a step, gradients are averaged.

`accelerate launch --num_processes 4 -m reverie train ...` starts them. What a device computes depends on the number of
its micro-batch alone, so that N devices with a batch of B learn what one learns that accumulates N times.
"""

import os
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reverie.errors import ConfigError


class Devices(Protocol):
    """The processes that train together.

    Attributes:
        rank: which of them this is, from 0; the first one writes.
        count: how many there are.
    """

    rank: int
    count: int

    def average(self, network: nn.Module, loss: Tensor) -> Tensor:
        """Every gradient becomes the mean over the devices; the mean loss."""
        ...

    def wait(self) -> None:
        """Until all have come here."""
        ...


class Alone:
    """One device."""

    rank, count = 0, 1

    def average(self, network: nn.Module, loss: Tensor) -> Tensor:
        """Nothing to average."""
        return loss

    def wait(self) -> None:
        """Nobody to wait for."""


class Together:
    """The processes that accelerate or torchrun has started."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self.rank, self.count = int(state.process_index), int(state.num_processes)

    def average(self, network: nn.Module, loss: Tensor) -> Tensor:
        """As one message: many small ones would wait for one another."""
        from accelerate.utils import reduce

        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        message = torch.cat([loss.detach().reshape(1), *(g.flatten() for g in gradients)])
        mean = reduce(message, reduction="mean")
        for gradient, part in zip(gradients, mean[1:].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        result: Tensor = mean[0]
        return result

    def wait(self) -> None:
        """A barrier."""
        self._state.wait_for_everyone()


def training_devices(device: torch.device) -> tuple[Devices, torch.device]:
    """The devices that train together, and this process's own; `device`, alone, where no launcher has said otherwise.

    Raises:
        ConfigError: there are several, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Alone(), device
    try:
        from accelerate import PartialState
    except ImportError:
        raise ConfigError("training on several devices needs accelerate: pip install 'reverie[train]'") from None
    state = PartialState(cpu=device.type == "cpu")
    return Together(state), state.device
