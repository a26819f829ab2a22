"""Tensors that are computed when their turn has come: whole models are renamed without reading a number.

The tables of the families work on tensors. Given tensors of this module, which have a shape and a type but no numbers,
they yield tensors of this module, each of which knows what it is made of. Peak memory is then that of one tensor, also
where the file holds packed numbers or a table copies.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from reverie.checkpoint.weightfile import WeightFile


class Deferred(Tensor):
    """A tensor on the meta device that remembers how to get its numbers: `now`."""

    load: Callable[[], Tensor]

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype, load: Callable[[], Tensor]) -> "Deferred":
        """A tensor of which `load` gives the numbers."""
        return _wrapped(torch.empty(tuple(shape), dtype=dtype, device="meta"), load)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do it to the shapes now, and to the numbers when they are asked for."""
        given = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **given)
        if isinstance(found, Tensor):
            return _wrapped(found, lambda: func(*_numbers(args), **given))
        if isinstance(found, tuple | list) and any(isinstance(part, Tensor) for part in found):
            return [_wrapped(part, _item(func, args, given, i)) for i, part in enumerate(found)]
        return found


class DeferredFile(WeightFile):
    """A weight file whose weights are `Deferred`."""

    @staticmethod
    def of(file: WeightFile) -> "DeferredFile":
        """The same file."""
        return DeferredFile(**{field.name: getattr(file, field.name) for field in fields(WeightFile)})

    def weight(self, name: str) -> Tensor:
        """One tensor, without its numbers."""
        info = self.tensors[name]
        return Deferred.of(info.shape, info.dtype, lambda: self.tensor(name))


def now(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, deferred or not."""
    return tensor.load() if isinstance(tensor, Deferred) else tensor


def _wrapped(meta: Tensor, load: Callable[[], Tensor]) -> Deferred:
    wrapped = meta.as_subclass(Deferred)
    wrapped.load = load
    return wrapped


def _numbers(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_numbers(part) for part in value)
    return now(value) if isinstance(value, Tensor) else value


def _item(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], index: int
) -> Callable[[], Tensor]:
    def load() -> Tensor:
        part: Tensor = func(*_numbers(args), **kwargs)[index]
        return part

    return load
