"""Changes that a file holds number by number: differences, replaced weights, IA3; and DoRA on top of others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from reverie.adapters.deltas.base import Delta, applied, as32, described, inputs, refuse


@dataclass(frozen=True, eq=False)
class FullDifference(Delta):
    """The difference of two weights as it is, and of two biases (LyCORIS `full`, ComfyUI's extraction).

    Attributes:
        weight: of the layer's shape.
        bias: `(out,)`.
    """

    endings: ClassVar[Mapping[str, str]] = {"weight": "diff", "bias": "diff_b"}
    weight: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], alpha: float | None, shape: Sequence[int]) -> Self:
        """Of the tensors of a file.

        Raises:
            CheckpointError: they do not have the layer's shape.
        """
        for name, wanted in (("weight", shape[0] * inputs(shape)), ("bias", shape[0])):
            found = tensors.get(ending := cls.endings[name])
            if found is not None and found.numel() != wanted:
                raise refuse(f"{ending} of {described(found.shape)} is no difference of a weight of {described(shape)}")
        return cls(tensors.get(cls.endings["weight"]), tensors.get(cls.endings["bias"]))

    def difference(self, weight: Tensor, strength: float) -> Tensor:
        """See `Delta`."""
        if self.weight is None:
            return torch.zeros((), device=weight.device).expand(weight.shape)
        return as32(self.weight, weight).reshape(weight.shape) * strength

    def bias_difference(self, bias: Tensor | None, strength: float) -> Tensor | None:
        """See `Delta`."""
        return None if self.bias is None else as32(self.bias, self.bias) * strength

    def rows(self, which: slice | Tensor) -> Self:
        """See `Delta`."""
        return replace(
            self,
            weight=None if self.weight is None else self.weight[which],
            bias=None if self.bias is None else self.bias[which],
        )


@dataclass(frozen=True, eq=False)
class NormDifference(FullDifference):
    """The difference of two norm layers (LyCORIS `train_norm`).

    Attributes:
        weight, bias: `(channels,)`.
    """

    endings: ClassVar[Mapping[str, str]] = {"weight": "w_norm", "bias": "b_norm"}


@dataclass(frozen=True, eq=False)
class Replacement(Delta):
    """Another weight instead of the layer's own (ComfyUI `set_weight`); strength goes from one to the other.

    Attributes:
        weight: of the layer's shape.
    """

    endings: ClassVar[Mapping[str, str]] = {"weight": "set_weight"}
    weight: Tensor

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], alpha: float | None, shape: Sequence[int]) -> "Replacement":
        """Of the tensors of a file.

        Raises:
            CheckpointError: it does not have the layer's shape.
        """
        weight = tensors["set_weight"]
        if tuple(weight.shape) != tuple(shape):
            raise refuse(f"set_weight of {described(weight.shape)} cannot replace a weight of {described(shape)}")
        return cls(weight)

    def difference(self, weight: Tensor, strength: float) -> Tensor:
        """See `Delta`."""
        return (as32(self.weight, weight) - as32(weight, weight)) * strength


@dataclass(frozen=True, eq=False)
class IA3(Delta):
    """Outputs or inputs are scaled by `1 + w` (Liu et al. 2022 with LyCORIS' offset).

    Attributes:
        weight: one number for each output or input.
        on_input: a number, not 0 for inputs.
    """

    cheap: ClassVar[bool] = True
    endings: ClassVar[Mapping[str, str]] = {"weight": "weight", "on_input": "on_input"}
    weight: Tensor
    on_input: Tensor

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], alpha: float | None, shape: Sequence[int]) -> "IA3":
        """Of the tensors of a file.

        Raises:
            CheckpointError: not one number for each output or input.
        """
        if "weight" not in tensors or "on_input" not in tensors:
            raise refuse("IA3 wants both weight and on_input")
        delta = cls(tensors["weight"], tensors["on_input"])
        wanted = shape[1] if delta.inward else shape[0]
        if delta.weight.numel() != wanted:
            found, kind = delta.weight.numel(), "inputs" if delta.inward else "outputs"
            raise refuse(f"IA3 has {found} numbers for the {wanted} {kind} of a weight of {described(shape)}")
        return delta

    @property
    def inward(self) -> bool:
        """Whether inputs are scaled."""
        return bool(self.on_input.any())

    def difference(self, weight: Tensor, strength: float) -> Tensor:
        """See `Delta`."""
        factors = as32(self.weight, weight).flatten()
        axis = 1 if self.inward else 0
        return as32(weight, weight) * along(factors, axis, weight.ndim) * strength

    def branch(self, layer: nn.Module, x: Tensor, strength: float) -> Tensor:
        """See `Delta`: what the layer says without bias, or of a scaled input."""
        factors = along(self.weight.to(x).flatten() * strength, 1 if isinstance(layer, nn.Conv2d) else -1, x.ndim)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if self.inward:
            return applied(layer, x * factors, weight.to(x.dtype))
        return applied(layer, x, weight.to(x.dtype)) * factors


@dataclass(frozen=True, eq=False)
class PeftIA3(Delta):
    """Outputs (the bias, too) or inputs are scaled by l (Liu et al. 2022, as peft writes it).

    Attributes:
        factors: `(out, 1)`, or `(1, in)`; of convolutions `(1, out, 1, 1)` or `(1, in, 1, 1)`.
        outward: whether outputs are scaled.
    """

    endings: ClassVar[Mapping[str, str]] = {"factors": "ia3_l"}
    factors: Tensor
    outward: bool = True

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], alpha: float | None, shape: Sequence[int]) -> "PeftIA3":
        """Of the tensors of a file. Of a convolution with as many inputs as outputs, peft's file does not say which
        are scaled; outputs are taken, which is what `feedforward_modules=[]` scales.

        Raises:
            CheckpointError: not one number for each output or input.
        """
        factors = tensors["ia3_l"]
        outward = factors.numel() == shape[0] and (factors.ndim != 2 or factors.shape[1] == 1)
        if not outward and factors.numel() != shape[1]:
            raise refuse(f"ia3_l of {described(factors.shape)} does not scale a weight of {described(shape)}")
        return cls(factors, outward)

    def difference(self, weight: Tensor, strength: float) -> Tensor:
        """See `Delta`."""
        change = (as32(self.factors, weight).flatten() - 1) * strength
        return as32(weight, weight) * along(change, 0 if self.outward else 1, weight.ndim)

    def bias_difference(self, bias: Tensor | None, strength: float) -> Tensor | None:
        """See `Delta`."""
        if bias is None or not self.outward:
            return None
        return as32(bias, bias) * (as32(self.factors, bias).flatten() - 1) * strength


@dataclass(frozen=True, eq=False)
class DoRA(Delta):
    """Another change `D` with magnitudes of its own: `m * (W + D) / ||W + D||` (Liu et al. 2024).

    The norm is taken of what belongs to each output where there is a magnitude for each output (peft, and LyCORIS with
    `wd_on_out`), else of what belongs to each input (LyCORIS without). Strength goes from W to that.

    Attributes:
        inner: D.
        magnitude: `(out, 1, ...)` or `(1, in, 1, ...)`.
    """

    endings: ClassVar[Mapping[str, str]] = {"magnitude": "dora_scale"}
    inner: Delta
    magnitude: Tensor

    @classmethod
    def build(cls, inner: Delta, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> "DoRA":
        """Around another change: `dora_scale` of LyCORIS, or peft's `lora_magnitude_vector`, always of outputs.

        Raises:
            CheckpointError: not one magnitude for each output or input.
        """
        peft = tensors.get("lora_magnitude_vector")
        magnitude = tensors["dora_scale"] if peft is None else peft.flatten()
        outward = magnitude.numel() == shape[0] == magnitude.shape[0]
        if not outward and magnitude.numel() != (-1 if peft is not None else shape[1]):
            raise refuse(f"DoRA has magnitudes of {described(magnitude.shape)} for a weight of {described(shape)}")
        return cls(inner, along(magnitude.flatten(), 0 if outward else 1, len(shape)))

    def difference(self, weight: Tensor, strength: float) -> Tensor:
        """See `Delta`. The norm passes no gradient (section 4.3 of the paper)."""
        original, magnitude = as32(weight, weight), as32(self.magnitude, weight)
        changed = self.inner.added(original, weight, 1.0)
        axes = [axis for axis in range(weight.ndim) if magnitude.shape[axis] == 1 < weight.shape[axis]]
        norm: Tensor = torch.linalg.vector_norm(changed.detach(), dim=axes, keepdim=True)
        return (changed * (magnitude / (norm + torch.finfo(norm.dtype).eps)) - original) * strength

    def bias_difference(self, bias: Tensor | None, strength: float) -> Tensor | None:
        """See `Delta`."""
        return self.inner.bias_difference(bias, strength)

    @property
    def rank(self) -> int | None:
        """That of the change inside."""
        return self.inner.rank

    def tensors(self) -> dict[str, Tensor]:
        """See `Delta`."""
        return self.inner.tensors() | super().tensors()

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """See `Delta`."""
        return replace(super().mapped(change), inner=self.inner.mapped(change))


def along(factors: Tensor, axis: int, dimensions: int) -> Tensor:
    """`(n,)` shaped to be multiplied along one axis of a tensor."""
    sizes = [1] * dimensions
    sizes[axis] = -1
    result: Tensor = factors.view(sizes)
    return result
