"""The handful of names in a pickle that mean what they say: tensors, containers, numbers.

Each function here stands for one callable of torch, numpy or Python and only ever makes plain data. `spend` pays for
copies by their length, because a pickle can ask for the same copy again and again.
"""

import struct
from collections.abc import Callable
from typing import Any

from reverie.checkpoint.inert import FormatError, Global, NumberType, Rebuilt, Storage, Unknown, hashable
from reverie.checkpoint.weightfile import MAX_DIMENSIONS

Spend = Callable[[int], None]

STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64", "UntypedStorage": "untyped",
}  # fmt: skip
STORAGE_MODULES = ("torch.", "torch.cuda.", "torch.storage.")
QUANTISED = ("QInt8Storage", "QInt32Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage")
NUMBERS = {
    "f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q",
    "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "b1": "?",
}  # fmt: skip
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
UNREAD = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor of torch",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on the meta device, without numbers",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a class of its own",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor stored as an array of numpy",
}


def storage(kind: Global, key: str, count: int, view: list[Any]) -> Storage:
    """The storage that a persistent id of torch names.

    Args:
        kind: the class, as `torch.FloatStorage`.
        count: of elements, or of bytes where the class has no type.
        view: nothing, None, or (key, offset, count) of a view, as versions before 0.4 wrote them.

    Raises:
        FormatError: another class, or impossible numbers.
    """
    module, _, name = kind.name.rpartition(".")
    if name in QUANTISED:
        raise FormatError(
            f"it has a quantised tensor of torch ({name}), which is not read; dequantise it and save it again"
        )
    if f"{module}." not in STORAGE_MODULES or name not in STORAGES:
        raise FormatError("its pickle refers to something outside that is no storage")
    offset = 0
    if view and view[0] is not None:
        _, offset, count = view[0]
    if not (_is_count(offset) and _is_count(count)):
        raise FormatError("its pickle describes a storage of impossible size")
    return Storage(key, STORAGES[name], count, offset)


def byte_order(state: Any) -> str:
    """The byte order in the state of a numpy dtype."""
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
    return ">" if order in (">", b">") else "<"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _tensor(memory: Any, offset: Any, shape: Any, stride: Any, kind: Any = None, metadata: Any = None) -> Rebuilt:
    if not isinstance(memory, Storage) or len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise FormatError("its pickle does not describe a tensor properly")
    if not all(map(_is_count, (offset, *shape, *stride))) or not isinstance(kind, Global | None):
        raise FormatError("its pickle does not describe a tensor properly")
    name = memory.kind if kind is None else kind.name.removeprefix("torch.")
    flags = metadata if isinstance(metadata, dict) else {}
    return Rebuilt(
        memory, offset, tuple(shape), tuple(stride), name, flags.get("conj") is True, flags.get("neg") is True
    )


def _tensor_v1(_: Spend, memory: Any, offset: Any, shape: Any, stride: Any) -> Rebuilt:
    return _tensor(memory, offset, shape, stride)


def _tensor_v2(
    _: Spend, memory: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
) -> Rebuilt:
    return _tensor(memory, offset, shape, stride, None, metadata)


def _tensor_v3(
    _: Spend, memory: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, kind: Any, metadata: Any = None
) -> Rebuilt:
    return _tensor(memory, offset, shape, stride, kind, metadata)


def _same(_: Spend, tensor: Any, *rest: Any) -> Rebuilt:
    """A parameter is its tensor; a tensor of another device is its copy on the CPU."""
    if not isinstance(tensor, Rebuilt):
        raise FormatError("its pickle does not describe a tensor properly")
    return tensor


def _tensor_of_type(spend: Spend, function: Any, kind: Any, args: Any, state: Any) -> Rebuilt:
    """A tensor with attributes, or of a subclass, is its tensor."""
    if not isinstance(function, Global) or function.name == FROM_TYPE or function.name not in TENSORS:
        raise FormatError("its pickle does not describe a tensor properly")
    return TENSORS[function.name](spend, *args)


def _unread(what: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise FormatError(f"it has {what}, which is not read")

    return refuse


def _table(spend: Spend, *args: Any) -> dict[Any, Any]:
    items = args[-1] if args else {}
    if isinstance(items, dict):
        spend(len(items))
        return dict(items)
    if not isinstance(items, (list, tuple)):  # the factory of a defaultdict
        return {}
    spend(4 * len(items))
    return {hashable(key): value for key, value in items}


def _list(spend: Spend, items: Any = ()) -> list[Any]:
    spend(len(items))
    return list(items)


def _tuple(spend: Spend, items: Any = ()) -> tuple[Any, ...]:
    return tuple(_list(spend, items))


def _set(spend: Spend, items: Any = ()) -> set[Any]:
    spend(4 * len(items))
    return set(map(hashable, items))


def _frozenset(spend: Spend, items: Any = ()) -> frozenset[Any]:
    return frozenset(_set(spend, items))


def _bytes(spend: Spend, content: Any = b"", encoding: Any = "latin-1") -> bytes:
    """`bytes`, `bytearray` and `_codecs.encode`, as protocol 2 writes bytes."""
    if not isinstance(content, (str, bytes, bytearray, list)):
        raise FormatError("its pickle makes bytes of something else")
    spend(len(content) // 32)
    return (
        content.encode("utf-8" if encoding in {"utf8", "utf-8"} else "latin-1")
        if isinstance(content, str)
        else bytes(content)
    )


def _number(kind: type) -> Callable[..., Any]:
    def make(_: Spend, *args: Any) -> Any:
        if any(isinstance(arg, (str, bytes)) and len(arg) > 100 for arg in args):
            raise FormatError("its pickle makes a number of a text")
        return kind(*args)

    return make


def _numpy_type(_: Spend, code: Any, *rest: Any) -> NumberType:
    return NumberType(str(code).lstrip("<>|="), ">" if str(code).startswith(">") else "<")


def _numpy_scalar(_: Spend, kind: Any, content: Any = b"") -> Any:
    code = NUMBERS.get(kind.code) if isinstance(kind, NumberType) else None
    if code is None or not isinstance(content, bytes):
        return Unknown("numpy.core.multiarray.scalar", (kind, content))
    return struct.unpack(kind.order + code, content)[0]


def _quiet(name: str) -> Callable[..., Unknown]:
    """What is no weight and harmless: kept as a record, not reported."""
    return lambda _, *args: Unknown(name, args)


TENSORS: dict[str, Callable[..., Rebuilt]] = {
    "torch._utils._rebuild_tensor": _tensor_v1,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _same,
    "torch.nn.parameter.Parameter": _same,
    FROM_TYPE: _tensor_of_type,
}
KNOWN: dict[str, Callable[..., Any]] = {
    **TENSORS,
    **{name: _unread(what) for name, what in UNREAD.items()},
    **{f"collections.{name}": _table for name in ("OrderedDict", "defaultdict", "Counter")},
    **{name: _quiet(name) for name in ("torch.device", "torch.serialization._get_layout", "builtins.object")},
    "builtins.dict": _table, "builtins.list": _list, "builtins.tuple": _tuple, "torch.Size": _tuple,
    "builtins.set": _set, "builtins.frozenset": _frozenset,
    "builtins.bytes": _bytes, "builtins.bytearray": _bytes, "_codecs.encode": _bytes,
    "builtins.int": _number(int), "builtins.float": _number(float), "builtins.complex": _number(complex),
    "builtins.bool": _number(bool),
    "numpy.dtype": _numpy_type, "numpy.core.multiarray.scalar": _numpy_scalar,
}  # fmt: skip
