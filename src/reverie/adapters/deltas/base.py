"""What every change of a weight can do."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.errors import CheckpointError

MOST_RANK = 16  # times the larger side of the layer; a file that wants more is broken, not generous


@dataclass(frozen=True, eq=False)
class Delta(ABC):
    """A change of one layer, as its file holds it.

    A change is always measured against the original weight, so that several add up in any order, and strength scales
    it: 0 is no change, 1 the change that was trained, -1 its opposite.

    Attributes:
        endings: the fields that hold tensors, and how the names of these end in a file.
        cheap: whether a side branch costs less than making the difference.
    """

    endings: ClassVar[Mapping[str, str]] = {}
    cheap: ClassVar[bool] = False

    @abstractmethod
    def difference(self, weight: Tensor, strength: float) -> Tensor:
        """What is added to a weight.

        Args:
            weight: the original, `(out, in)` or `(out, in, k, k)`; of a norm `(channels,)`.

        Returns:
            Of the weight's shape, float32, on the weight's device.
        """

    def added(self, total: Tensor, weight: Tensor, strength: float) -> Tensor:
        """`total`, float32, with the difference to `weight` added: a new tensor."""
        return total + self.difference(weight, strength)

    def bias_difference(self, bias: Tensor | None, strength: float) -> Tensor | None:
        """What is added to the layer's bias `(out,)`, or becomes it where there is none: float32; None for nothing."""
        return None

    def branch(self, layer: nn.Module, x: Tensor, strength: float) -> Tensor:
        """What is added to the layer's output, without merging.

        Args:
            layer: a linear layer or a convolution, packed ones too: what has a `weight`.
            x: its input, `(..., in)` or `(B, in, h, w)`.

        Returns:
            Of the shape and precision of the layer's output.
        """
        weight = layer.weight
        assert isinstance(weight, Tensor)
        bias = self.bias_difference(bias_of(layer), strength)
        change = self.difference(weight, strength).to(x.dtype)
        return applied(layer, x, change, None if bias is None else bias.to(x.dtype))

    @property
    def rank(self) -> int | None:
        """Of a factorised change; None for others."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """As they are written to a file: by the end of the name."""
        found = {ending: getattr(self, name) for name, ending in self.endings.items()}
        alpha = getattr(self, "alpha", None)
        found["alpha"] = None if alpha is None else torch.tensor(float(alpha))
        return {ending: tensor for ending, tensor in found.items() if tensor is not None}

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with other tensors: moved, cast, or made parameters for training."""
        named = {name: getattr(self, name) for name in self.endings}
        return replace(self, **{name: change(t) for name, t in named.items() if t is not None})

    def rows(self, which: slice | Tensor) -> "Delta":
        """The change of some of the layer's outputs, for files that keep several layers in one.

        Raises:
            CheckpointError: this algorithm does not come apart.
        """
        raise CheckpointError(f"{type(self).__name__} of several layers in one cannot be taken apart")


@dataclass(frozen=True, eq=False)
class Sum(Delta):
    """Several changes of one layer, as merged networks have them: the sum of their differences."""

    parts: tuple[Delta, ...]

    def difference(self, weight: Tensor, strength: float) -> Tensor:
        """See `Delta`."""
        first, *rest = self.parts
        total = first.difference(weight, strength)
        for part in rest:
            total = part.added(total, weight, strength)
        return total

    def bias_difference(self, bias: Tensor | None, strength: float) -> Tensor | None:
        """See `Delta`."""
        return summed([part.bias_difference(bias, strength) for part in self.parts])

    def branch(self, layer: nn.Module, x: Tensor, strength: float) -> Tensor:
        """See `Delta`."""
        return sum(
            (part.branch(layer, x, strength) for part in self.parts[1:]), self.parts[0].branch(layer, x, strength)
        )

    @property
    def rank(self) -> int | None:
        """Of all together."""
        return sum(part.rank or 0 for part in self.parts) or None

    def tensors(self) -> dict[str, Tensor]:
        """See `Delta`.

        Raises:
            CheckpointError: two parts of one algorithm, for which a file has no names.
        """
        names = [name for part in self.parts for name in part.tensors() if name != "alpha"]
        if len(set(names)) < len(names):
            raise CheckpointError(
                "two changes of one kind at one layer cannot be written to one file; merge them first"
            )
        return {name: t for part in self.parts for name, t in part.tensors().items()}

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """See `Delta`."""
        return replace(self, parts=tuple(part.mapped(change) for part in self.parts))

    def rows(self, which: slice | Tensor) -> Delta:
        """See `Delta`."""
        return Sum(tuple(part.rows(which) for part in self.parts))


def applied(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `layer` would say with another weight of any number of outputs: its stride and padding, wherever it ends."""
    result: Tensor = layer._conv_forward(x, weight, bias) if isinstance(layer, nn.Conv2d) else F.linear(x, weight, bias)
    return result


def pointwise(layer: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
    """`matrix (m, n)` at every position of `x (..., n)`, or `(B, n, h, w)` where the layer is a convolution."""
    return F.conv2d(x, matrix[:, :, None, None]) if isinstance(layer, nn.Conv2d) else F.linear(x, matrix)


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias of a layer, if it has one."""
    bias = getattr(layer, "bias", None)
    assert bias is None or isinstance(bias, Tensor)
    return bias


def summed(terms: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of those that are there, from left to right."""
    total: Tensor | None = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def as32(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in float32 on the device of another; in float64 where either is."""
    dtype = torch.float64 if torch.float64 in {tensor.dtype, like.dtype} else torch.float32
    return tensor.to(like.device, dtype)


# Checking what a file holds


class AbsurdRankError(CheckpointError):
    """A rank that no trainer writes: not one layer does not fit, the file is broken."""


def refuse(what: str) -> CheckpointError:
    """The error for tensors that make no change of a layer."""
    return CheckpointError(f"{what}; the file is damaged or made for another model")


def described(shape: Sequence[int]) -> str:
    """`320 x 768`."""
    return " x ".join(map(str, shape)) or "one number"


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity.

    Raises:
        CheckpointError: the tensor is named by its ending.
    """
    for ending, tensor in tensors.items():
        # A sum in float32 of numbers below 65504 stays finite, and is much quicker than a test of each.
        if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{ending} holds NaN or infinity; the file is damaged: fetch it again")


def check_rank(rank: int, shape: Sequence[int], ending: str) -> None:
    """Refuse a rank that no layer can use.

    Raises:
        CheckpointError: none at all.
        AbsurdRankError: many times the size of the layer.
    """
    text = f"{ending} has rank {rank} for a layer of {described(shape)}"
    if rank > MOST_RANK * max(shape[0], inputs(shape)):
        raise AbsurdRankError(f"{text}; the file is damaged: fetch it again")
    if rank < 1:
        raise refuse(text)


def inputs(shape: Sequence[int]) -> int:
    """Numbers that one output of a layer is made of: in, or in * k * k."""
    return math.prod(shape[1:])


def scale_of(alpha: float | None, rank: int) -> float:
    """`alpha / rank`; 1 where there is no alpha, or a zero (LyCORIS: alpha 0 is the rank)."""
    return alpha / rank if alpha else 1.0
