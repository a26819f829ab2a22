"""Averaged weights."""

import torch
from torch import Tensor, nn


class Ema:
    """An exponential moving average of a module's parameters.

    The decay rises with the step number, `min(decay, (1 + step) / (10 + step))`, so that an early average does not
    remember the random start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow: dict[str, Tensor] = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the module's present weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in module.named_parameters():
            self.shadow[name].lerp_(p.detach(), 1 - decay)
