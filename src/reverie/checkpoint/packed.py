"""Packed weights as tensors: they stay packed in memory and are unpacked where they are used, one layer at a time.

A layer keeps such a tensor as its `weight`, so that the network needs no layers of another kind: linear and
convolutional layers, seamless forms of a network and side branches work with it as with any other. The numbers are
those of the unpacked weights, to the bit, because the same function unpacks both.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from reverie.checkpoint.quantised import FLOAT8, HALVES, QuantisedTensor

ASKED = {
    "size", "dim", "numel", "nelement", "ndimension", "element_size", "stride", "is_contiguous", "is_floating_point",
    "is_complex", "get_device", "storage_offset", "requires_grad_", "is_shared", "__len__", "__hash__", "_is_view",
    "requires_grad=", "grad=", "_has_compatible_shallow_copy_type",
}  # fmt: skip
"""What is asked of a tensor without its numbers."""
CHANGING = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__", "data="}  # beside `add_`, `mul_`, ...


class PackedTensor(Tensor):
    """Weights that are packed, of the shape and type that they are unpacked to. They cannot be changed in place.

    Moved with `to`, split into rows with `chunk` and reshaped they stay packed; every other operation unpacks them
    and goes on with a plain tensor.

    Attributes:
        packed: the packed numbers.
    """

    packed: QuantisedTensor

    @staticmethod
    def of(packed: QuantisedTensor, dtype: torch.dtype = torch.float32) -> "PackedTensor":
        """The packed numbers as a tensor of `dtype`."""
        wrapped: PackedTensor = torch.Tensor._make_wrapper_subclass(
            PackedTensor, packed.shape, dtype=dtype, device=packed.data.device
        )
        wrapped.packed = packed
        return wrapped

    def unpacked(self) -> Tensor:
        """The numbers, computed anew."""
        return self.packed.dequantise(self.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Keep packed what can stay so, refuse changes, and unpack for everything else."""
        name, given = _name(func), dict(kwargs or {})
        if name in ASKED or (name not in KEPT and getattr(func, "__name__", "") == "__get__"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **given)
        if args and isinstance(args[0], PackedTensor):
            if name in KEPT and (kept := KEPT[name](args[0], func, args[1:], given)) is not None:
                return kept
            if name in CHANGING or name.rstrip("_") + "_" == name:
                raise RuntimeError(f"{name} on packed weights, which cannot be changed in place; unpack them first")
        if func is F.linear and (product := _product(args, given)) is not None:
            return product
        if func is F.embedding and isinstance(args[1], PackedTensor):
            return _looked_up(func, args, given)
        return func(*unpacked(args), **unpacked(given))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What comes past `__torch_function__`, from inside of torch, gets the numbers."""
        return func(*unpacked(args), **unpacked(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedTensor({list(self.shape)}, {self.packed.packing} as {self.dtype})"


def unpacked(value: Any) -> Any:
    """The same with every packed tensor in it unpacked."""
    return tree_map_only(PackedTensor, PackedTensor.unpacked, value)


def plain(tensor: Tensor) -> Tensor:
    """8-bit floats without a scale as torch has them; every other tensor as it is."""
    if not isinstance(tensor, PackedTensor) or tensor.packed.packing not in FLOAT8 or tensor.packed.scale is not None:
        return tensor
    return tensor.packed.data


def is_packed(module: nn.Module) -> bool:
    """Whether any weight of a network is packed, more closely than in halves."""
    return any(isinstance(p, PackedTensor) and not is_halved(p) for p in module.parameters())


def is_halved(tensor: Tensor) -> bool:
    """Whether these are halves (float16, bfloat16) that stand for numbers of another type, wider or as wide."""
    return isinstance(tensor, PackedTensor) and tensor.packed.packing in HALVES


def halve(module: nn.Module, dtype: torch.dtype, least: int) -> None:
    """Let the halves of a network's layers stay where they lie, a mapped file say, and stand for numbers of `dtype`.

    Args:
        least: numbers of a weight; smaller ones stay as they are.
    """
    packings = {half: name for name, half in HALVES.items() if half != dtype and half.itemsize <= dtype.itemsize}
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding) and type(layer.weight) is nn.Parameter:
            weight = layer.weight.detach()
            if weight.dtype in packings and weight.numel() >= least:
                halves = QuantisedTensor(weight, packings[weight.dtype], tuple(weight.shape))
                layer.register_parameter("weight", nn.Parameter(PackedTensor.of(halves, dtype), requires_grad=False))


def numbers_of(tensor: Tensor) -> Tensor:
    """The tensor that holds the numbers, packed or not."""
    return tensor.packed.data if isinstance(tensor, PackedTensor) else tensor


def unpack(module: nn.Module, dtype: torch.dtype) -> None:
    """Put plain weights of `dtype` in the places of the packed ones of a network, one after the other."""
    for layer in module.modules():
        for name, p in layer.named_parameters(recurse=False):
            if isinstance(p, PackedTensor):
                layer.register_parameter(name, nn.Parameter(p.packed.dequantise(dtype), requires_grad=False))


def _name(func: Callable[..., Any]) -> str:
    """The name of a function of torch; of an attribute that is set, with an equals sign behind it."""
    name = getattr(func, "__name__", "")
    if name not in {"__get__", "__set__"}:
        return str(name)
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    return attribute if name == "__get__" else f"{attribute}="


def _moved(tensor: PackedTensor, func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> Tensor | None:
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, *_ = torch._C._nn._parse_to(*args, **given)
    if dtype is not None and not dtype.is_floating_point:
        return None
    packed = tensor.packed if device is None or device == tensor.device else tensor.packed.to(device)
    if packed is tensor.packed and dtype in (None, tensor.dtype):
        return tensor
    return PackedTensor.of(packed, dtype or tensor.dtype)


def _reshaped(tensor: PackedTensor, func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> Tensor | None:
    shape = func(torch.empty(tensor.shape, device="meta"), *args, **given).shape
    rows = tensor.packed.scale is not None and tensor.packed.scale.numel() > 1
    if rows and shape[:1] != tensor.shape[:1]:
        return None
    return PackedTensor.of(tensor.packed.shaped(shape), tensor.dtype)


def _chunked(
    tensor: PackedTensor, func: Any, args: Sequence[Any], given: Mapping[str, Any]
) -> tuple[Tensor, ...] | None:
    if given or len(args) != 1 or not tensor.ndim:  # along another dimension than the first
        return None
    parts = [tensor.packed.rows(which) for which in torch.arange(len(tensor)).chunk(args[0])]
    return tuple(PackedTensor.of(part, tensor.dtype) for part in parts if part is not None) or None


def _copied(tensor: PackedTensor, func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> Tensor:
    """A deep copy shares the packed numbers, which nothing changes."""
    copied = _same(tensor, func, args, given)
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, requires_grad=False)
    args[0][id(tensor)] = copied
    return copied


def _same(tensor: PackedTensor, func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> Tensor:
    return PackedTensor.of(tensor.packed, tensor.dtype)


def _itself(tensor: PackedTensor, func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> Tensor:
    return tensor


def _set(tensor: PackedTensor, func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> Any:
    """`tensor.data = value`: how `nn.Module.to` moves its parameters."""
    (value,) = args
    if not isinstance(value, PackedTensor):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        func(tensor, value)
    tensor.packed = value.packed
    return True


FEWEST = 17  # rows of inputs that `torch._int_mm` takes on CUDA
MULTIPLE = 16  # of which the sizes of products in 8 bits are; cuBLAS


def _product(args: Sequence[Any], given: Mapping[str, Any]) -> Tensor | None:
    """What a linear layer says by a product in 8 bits; None where the weights do not multiply so."""
    x, weight, bias = (*args, None)[:3] if not given else (args[0], args[1], given.get("bias"))
    if not isinstance(weight, PackedTensor) or not weight.packed.products:
        return None
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) < FEWEST or any(size % MULTIPLE for size in weight.shape):
        return None
    y = weight.packed.multiplied(rows).to(x.dtype).reshape(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias


def _looked_up(func: Callable[..., Any], args: Sequence[Any], given: Mapping[str, Any]) -> Tensor:
    """Rows of a packed table: they alone are unpacked."""
    ids, table, *rest = args
    found = table.packed.rows(ids.flatten())
    if found is None:
        result: Tensor = func(ids, table.unpacked(), *rest, **given)
        return result
    rows: Tensor = found.dequantise(table.dtype).reshape(*ids.shape, *table.shape[1:])
    return rows


Keeper = Callable[[PackedTensor, Any, Sequence[Any], Mapping[str, Any]], Any]
KEPT: dict[str, Keeper] = {
    "to": _moved, "chunk": _chunked, "reshape": _reshaped, "view": _reshaped, "flatten": _reshaped, "detach": _same,
    "clone": _same, "__deepcopy__": _copied, "data": _itself, "contiguous": _itself, "data=": _set,
}  # fmt: skip
"""Operations after which weights are still packed; None of them is: unpack."""
