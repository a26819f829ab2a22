"""Strict loading: a module built on the meta device takes its tensors from the file, or one error says why not."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reverie.collector import paused_collector
from reverie.errors import CheckpointError

M = TypeVar("M", bound=nn.Module)


@paused_collector()
def build(make: Callable[[], M], tensors: Mapping[str, Tensor], where: str) -> M:
    """A module whose parameters are `tensors`, without a copy.

    Args:
        make: builds the module; called on the meta device.
        tensors: named as the module names its parameters.
        where: for error messages, for example `"the U-Net in model.safetensors"`.

    Raises:
        CheckpointError: missing, unexpected or wrongly shaped tensors; a config of impossible values.
    """
    try:
        with torch.device("meta"), _Unfilled():
            module = make()
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{where} has a config that describes no network: {reason}") from None
    slots = _slots(module)
    expected = {name: slot.tensor.shape for name, slot in slots.items()}
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    wrong = [name for name, shape in expected.items() if name in tensors and tensors[name].shape != shape]
    if missing or unexpected or wrong:
        raise CheckpointError(_explain(where, expected, tensors, missing, unexpected, wrong))
    numbers = [name for name, t in tensors.items() if not t.is_floating_point()]
    if numbers:
        raise CheckpointError(
            f"{where} does not fit: {_some(numbers)} of type {str(tensors[numbers[0]].dtype).removeprefix('torch.')}; "
            "weights are floating point (quantised files are not supported)"
        )
    for name, slot in slots.items():
        slot.fill(tensors[name])
    return module.eval()


@dataclass(frozen=True)
class _Slot:
    """Where a module keeps one tensor. `load_state_dict` does the same at four times the cost."""

    kept: dict[str, Any]
    name: str

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = self.kept[self.name]
        return tensor

    def fill(self, tensor: Tensor) -> None:
        learned = isinstance(self.tensor, nn.Parameter) and not isinstance(tensor, nn.Parameter)
        self.kept[self.name] = nn.Parameter(tensor, requires_grad=False) if learned else tensor.requires_grad_(False)


def _slots(module: nn.Module) -> dict[str, _Slot]:
    """Of every tensor of a state dict, under its name there."""
    found: dict[str, _Slot] = {}
    for path, inner in module.named_modules(remove_duplicate=False):
        start = f"{path}." if path else ""
        lasting = inner._buffers.keys() - inner._non_persistent_buffers_set
        for kept, names in ((inner._parameters, inner._parameters.keys()), (inner._buffers, lasting)):
            found |= {f"{start}{name}": _Slot(kept, name) for name in names if kept[name] is not None}
    return found


class _Unfilled(TorchFunctionMode):
    """Leaves out the random initial weights, which are not wanted here.

    On the meta device they would cost nothing, but PyTorch imports its compiler for them: three seconds.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _explain(
    where: str,
    expected: Mapping[str, torch.Size],
    tensors: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    wrong: list[str],
) -> str:
    parts = []
    if missing:
        near = difflib.get_close_matches(missing[0], unexpected, n=1)
        hint = f"; found {near[0]} instead?" if near else ""
        parts.append(f"{_some(missing)} missing{hint}")
    if unexpected:
        parts.append(f"{_some(unexpected)} not expected")
    if wrong:
        name = wrong[0]
        parts.append(
            f"{_some(wrong)} wrongly shaped: {list(tensors[name].shape)} found, {list(expected[name])} expected"
        )
    return f"{where} does not fit: {'; '.join(parts)}"


def _some(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:3])}{', ...' if names[3:] else ''})"
