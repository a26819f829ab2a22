"""Attention a part of its queries at a time, for devices whose attention keeps all scores."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from reverie.nets.attention import Attention, attention
from reverie.types import AttentionTap, Cond, Predict, Taps


def sliced(predict: Predict, network: nn.Module, rows: int | None) -> Predict:
    """`predict` whose attention layers look at so many queries at a time; what else taps a layer goes before.

    The numbers are the same up to the order in which a kernel sums.

    Args:
        network: a U-Net, or what it is a form of; the layers of a diffusion transformer are left as they are.
        rows: None for all queries at once.
    """
    if rows is None:
        return predict
    paths = [path for path, module in network.named_modules() if isinstance(module, Attention)]
    taps = Taps(attention=dict.fromkeys(paths, in_slices(rows)))

    def slicing(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        return predict(x, sigma, replace(cond, taps=taps.with_(cond.taps or Taps())))

    return slicing


def in_slices(rows: int) -> AttentionTap:
    """What an attention layer of a U-Net says, so many queries at a time."""

    def tap(module: nn.Module, x: Tensor, context: Tensor | None, usual: Callable[[], Tensor]) -> Tensor:
        if x.shape[1] <= rows:
            return usual()
        assert isinstance(module, Attention)
        k, v = module.keys_values(x if context is None else context)
        parts = [attention(module.split(module.to_q(part)), k, v) for part in torch.split(x, rows, dim=1)]
        return module.merged(torch.cat(parts, dim=2))

    return tap
