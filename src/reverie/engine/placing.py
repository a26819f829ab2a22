"""Bringing a network's weights to the device and precision that it computes in, once they are seen to be sound."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from reverie.checkpoint.packed import PackedTensor, is_packed, unpack
from reverie.engine.memory import available
from reverie.errors import CheckpointError

Weights = Literal["auto", "packed", "full"]
WEIGHTS = ("auto", "packed", "full")
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


def place(module: nn.Module, device: torch.device, dtype: torch.dtype, *, packed: bool = False) -> None:
    """Bring every weight to a device and a precision, in place, one after the other.

    Where neither changes nothing is copied: the weights stay views of their file.

    Args:
        packed: packed weights stay packed and are unpacked at every use.
    """
    if not packed:
        unpack(module, dtype)
    module.to(device, dtype)


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
