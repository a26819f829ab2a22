"""Attention taps of adapters together with those that guidance has set."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from reverie.types import AttentionTap, Cond, Taps


def beneath(cond: Cond, taps: Mapping[str, AttentionTap]) -> Cond:
    """The condition tapped by `taps`, too; a tap that is there already finds in them what is usual.

    So a layer whose attention is recorded or smoothed says what it says with the adapter.
    """
    there = cond.taps or Taps()
    joined = {
        path: _under(there.attention[path], tap) if path in there.attention else tap for path, tap in taps.items()
    }
    return replace(cond, taps=replace(there, attention={**there.attention, **joined}))


def _under(outer: AttentionTap, inner: AttentionTap) -> AttentionTap:
    def tap(module: nn.Module, x: Tensor, context: Tensor | None, usual: Callable[[], Tensor]) -> Tensor:
        return outer(module, x, context, lambda: inner(module, x, context, usual))

    return tap
