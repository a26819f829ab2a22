"""Tensors of a file and what they are of ours, one by one: for layouts that differ in more than names."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from reverie.errors import CheckpointError

Tensors: TypeAlias = Mapping[str, Tensor]
Change: TypeAlias = Literal["", "swapped", "transposed"]


@dataclass(frozen=True)
class Pair:
    """One tensor of the file and what it is of ours.

    Attributes:
        theirs: its name in the file, without the prefix.
        ours: our names for its equal parts, from the first row down: one, or queries, keys and values.
        change: its halves change places (shift and scale), or its rows and columns do.
    """

    theirs: str
    ours: tuple[str, ...]
    change: Change = ""

    def apart(self, tensor: Tensor) -> Sequence[Tensor]:
        """Ours of theirs: views, but for a copy of swapped halves.

        Raises:
            CheckpointError: the rows do not divide into the parts.
        """
        parts = 2 if self.change == "swapped" else len(self.ours)
        if parts > 1 and (tensor.ndim == 0 or tensor.shape[0] % parts):
            raise CheckpointError(f"tensor {self.theirs} has shape {list(tensor.shape)}: no {parts} equal parts")
        if self.change:
            return [self._changed(tensor)]
        return tensor.chunk(parts) if parts > 1 else [tensor]

    def together(self, tensors: Sequence[Tensor]) -> Tensor:
        """Theirs of ours: the same tensor where there is one, else a copy."""
        if self.change:
            return self._changed(tensors[0])
        return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]

    def _changed(self, tensor: Tensor) -> Tensor:
        if self.change == "transposed":
            if tensor.ndim != 2:
                raise CheckpointError(f"tensor {self.theirs} has shape {list(tensor.shape)}; expected two dimensions")
            return tensor.t()
        return torch.cat(tensor.chunk(2)[::-1])


def from_file(table: Sequence[Pair], tensors: Tensors, what: str) -> dict[str, Tensor]:
    """Tensors of a file under our names. Missing ones stay missing.

    Args:
        tensors: by their names in the file, without the prefix.
        what: the model, for messages.

    Raises:
        CheckpointError: a tensor that is not in the table.
    """
    refuse_strangers(tensors, {pair.theirs for pair in table}, what)
    found: dict[str, Tensor] = {}
    for pair in table:
        if pair.theirs in tensors:
            found |= zip(pair.ours, pair.apart(tensors[pair.theirs]), strict=True)
    return found


def shapes_from_file(table: Sequence[Pair], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes in a file under our names, for reading a config: each of several parts has the shape of the whole."""
    found: dict[str, tuple[int, ...]] = {}
    for pair in table:
        if pair.theirs in shapes:
            shape = shapes[pair.theirs]
            found |= dict.fromkeys(pair.ours, shape[::-1] if pair.change else shape)
    return found


def to_file(table: Sequence[Pair], tensors: Tensors, what: str) -> dict[str, Tensor]:
    """Our tensors under their names in a file, without the prefix.

    Raises:
        CheckpointError: a tensor too many or too few.
    """
    refuse_strangers(tensors, {name for pair in table for name in pair.ours}, what)
    if missing := [name for pair in table for name in pair.ours if name not in tensors]:
        raise CheckpointError(f"{len(missing)} tensors of {what} are missing: {missing[0]}, ...")
    return {pair.theirs: pair.together([tensors[name] for name in pair.ours]) for pair in table}


def refuse_strangers(names: Iterable[str], known: Iterable[str], what: str, kind: str = "tensor") -> None:
    """Refuse names that the model does not have.

    Raises:
        CheckpointError: the first of them is named.
    """
    there = set(known)
    if strangers := [name for name in names if name not in there]:
        raise CheckpointError(f"{len(strangers)} {kind}s that {what} has not: {strangers[0]}, ...")
