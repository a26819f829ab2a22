"""Networks whose pictures join at their edges: convolutions that continue on the opposite side."""

import copy
from typing import Literal, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

Axes = Literal["x", "y", "both"]
M = TypeVar("M", bound=nn.Module)


class _Wrapping(nn.Conv2d):
    """A convolution that sees the left edge beyond the right one (`x`), the top beyond the bottom (`y`), or both."""

    axes: Axes

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        down, across = (int(p) for p in self.padding)
        round_, zeros = [0, 0, 0, 0], [0, 0, 0, 0]
        (round_ if self.axes in {"x", "both"} else zeros)[:2] = [across, across]
        (round_ if self.axes in {"y", "both"} else zeros)[2:] = [down, down]
        padded = F.pad(F.pad(input, round_, "circular"), zeros)
        return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


def seamless(network: M, axes: Axes) -> M:
    """A copy of `network` that shares its weights and wraps around along `axes`.

    The network itself is untouched, so that pictures with and without it can be drawn at once.
    """
    shared = {id(t): t for t in (*network.parameters(), *network.buffers())}
    copied = copy.deepcopy(network, dict[int, object](shared))
    for module in copied.modules():
        if type(module) is nn.Conv2d and any(module.padding):
            module.__class__ = _Wrapping
            module.axes = axes  # type: ignore[assignment]
    return copied
