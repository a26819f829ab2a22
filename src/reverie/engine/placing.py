"""Bringing a network's weights to the device and precision that it computes in, once they are seen to be sound."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from reverie.checkpoint.packed import PackedTensor, halve, is_packed, unpack
from reverie.checkpoint.quantising import PACKINGS, Quantisation, quantise
from reverie.engine.blockwise import Conveyor, Slot, slots_of
from reverie.engine.mapped import MappedFiles
from reverie.engine.memory import available
from reverie.errors import CheckpointError

Weights = Literal["auto", "packed", "full", "fp8", "int8", "int4"]
WEIGHTS = ("auto", "packed", "full", *PACKINGS)
CHUNK = 1 << 22  # numbers that are looked at at once


def check_numbers(module: nn.Module, source: Path, part: str) -> None:
    """Read every weight of a network.

    Args:
        source, part: for the message, the path of the model and which of its networks this is.

    Raises:
        CheckpointError: NaN or infinity; the tensor is named.
    """
    for key, p in module.named_parameters():
        if not _is_finite(p):
            raise CheckpointError(f"{source}: tensor {key} of {part} has NaN or infinite numbers; the file is damaged")


def place(
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    *,
    packed: bool = False,
    quantisation: Quantisation | None = None,
    halves: int | None = None,
    layout: torch.memory_format = torch.preserve_format,
) -> None:
    """Bring every weight to a device and a precision, in place, one after the other.

    Where neither changes nothing is copied: the weights stay views of their file.

    Args:
        packed: packed weights stay packed and are unpacked at every use.
        quantisation: to which weights are quantised.
        halves: numbers of a weight from which halves stay what they are and are widened where they are used.
        layout: of convolutions' weights.
    """
    if quantisation is not None:
        quantise(module, quantisation, device, dtype)
    elif not packed:
        unpack(module, dtype)
    if halves is not None:
        halve(module, dtype, halves)
    module.to(device, dtype)
    if layout != torch.preserve_format:
        module.to(memory_format=layout)  # type: ignore[call-overload]  # documented, but not in its types


class Originals:
    """The weights of a network as they lie before it is placed, to which it can go back without a copy.

    Weights of a mapped file cost no memory while they are kept here.
    """

    def __init__(self, module: nn.Module) -> None:
        self._kept = [_Kept.of(slot) for slot in slots_of(module)]

    def restore(self) -> None:
        """Put every weight back."""
        for kept in self._kept:
            kept.restore()

    def forget(self) -> None:
        """Let the system take the pages of those that are mapped."""
        MappedFiles().unwanted(kept.data for kept in self._kept)


@dataclass(frozen=True)
class _Kept:
    """A weight, and its numbers: `nn.Module.to` gives a parameter others and keeps the parameter."""

    slot: Slot
    data: Tensor

    @classmethod
    def of(cls, slot: Slot) -> "_Kept":
        there = slot.there
        return cls(slot, PackedTensor.of(there.packed, there.dtype) if isinstance(there, PackedTensor) else there.data)

    def restore(self) -> None:
        self.slot.there.data = self.data
        self.slot.kept[self.slot.name] = self.slot.there


@dataclass(frozen=True)
class Placed:
    """A network that is ready to compute.

    Attributes:
        network: it, or the form whose blocks are brought one after the other.
        originals: what it was before; None for a form, which leaves it alone.
        conveyor: what brings blocks.
        forgets: whether pages of its file are let go with it.
    """

    network: nn.Module
    originals: Originals | None = None
    conveyor: Conveyor | None = None
    forgets: bool = False

    def leave(self) -> None:
        """Take it off the device, or out of the memory that it has for itself."""
        if self.conveyor is not None:
            self.conveyor.clear()
        if self.originals is not None:
            self.originals.restore()
            if self.forgets:
                self.originals.forget()


def keeps_packed(weights: Weights, modules: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed weights stay packed: asked for, or the model unpacked would take over half of the free memory.

    Unpacking at every use costs time, so that it is done once where memory is ample.

    Args:
        weights: `packed`, `full`, or `auto` for this rule.
        modules: all networks of the model.
    """
    networks = list(modules)
    if weights != "auto" or not any(is_packed(module) for module in networks):
        return weights == "packed"
    size = sum(p.numel() for module in networks for p in module.parameters()) * dtype.itemsize
    return size > available(device) / 2


def _is_finite(tensor: Tensor) -> bool:
    if isinstance(tensor, PackedTensor):
        return tensor.packed.is_finite()
    if tensor.element_size() > 1 and bool(torch.isfinite(tensor.sum())):
        return True
    # A sum of float16 may outgrow it, and there is none of 8-bit floats.
    return all(bool(torch.isfinite(part.float()).all()) for part in torch.split(tensor.reshape(-1), CHUNK))
