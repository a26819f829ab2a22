"""A network whose blocks get memory one after the other, the next one brought while the present one computes.

It is a form of the network: its modules are copies, its weights are the same tensors where they lie, mapped from their
file. When a block is entered, its weights are brought to the device and the precision that it computes in; when it is
left, they are let go. Where nothing has to be brought (CPU, same precision) the system's cache is told instead which
pages are wanted and which are not. The numbers are the same as those of the network brought whole.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from reverie.checkpoint.packed import PackedTensor
from reverie.engine.mapped import MappedFiles
from reverie.nets import blocks, clip_text, mmdit, t5
from reverie.nets.attention import TransformerBlock

M = TypeVar("M", bound=nn.Module)
BLOCKS = (
    blocks.ResnetBlock, blocks.Downsample, blocks.Upsample, TransformerBlock, mmdit.JointBlock, clip_text.Layer,
    t5.Block,
)  # fmt: skip
"""What is brought at once; they do not lie inside each other."""


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network, in no special order; none of networks that are made of others."""
    return [module for module in network.modules() if isinstance(module, BLOCKS)]


@dataclass(frozen=True)
class Slot:
    """Where a block keeps one of its weights.

    Attributes:
        kept: the parameters or buffers of a module.
        there: the weight where it lies.
    """

    kept: dict[str, Any]
    name: str
    there: Tensor

    def fill(self, tensor: Tensor) -> None:
        """Put another tensor in its place."""
        parameter = isinstance(self.there, nn.Parameter) and not isinstance(tensor, nn.Parameter)
        self.kept[self.name] = nn.Parameter(tensor, requires_grad=False) if parameter else tensor


def slots_of(module: nn.Module) -> list[Slot]:
    """Every weight of a module, in all of its layers."""
    return [
        Slot(kept, name, tensor)
        for layer in module.modules()
        for kept in (layer._parameters, layer._buffers)
        for name, tensor in kept.items()
        if tensor is not None
    ]


def blockwise(network: M, device: torch.device, dtype: torch.dtype) -> tuple[M, "Conveyor"]:
    """The form of a network whose blocks are brought one after the other, and what brings them.

    Args:
        network: with its weights where they lie; it is not changed, and must not be while the form is used.
    """
    same: dict[int, object] = {id(t): t for t in (*network.parameters(), *network.buffers())}
    form = copy.deepcopy(network, same)
    inside = {id(slot.kept) for block in blocks_of(form) for slot in slots_of(block)}
    conveyor = Conveyor(form, device, dtype)
    for slot in slots_of(form):
        if id(slot.kept) not in inside:
            slot.fill(conveyor.brought(slot.there))
    return form, conveyor


class Conveyor:
    """Brings the blocks of one network. One evaluation at a time: others wait.

    The order in which blocks are entered is learned: behind a block comes the one that came behind it the last time.

    Attributes:
        log: is told `bring` and `drop` with the number of the block, for those who want to know.
    """

    def __init__(self, form: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.log: Callable[[str, int], None] = lambda what, number: None
        self._files = MappedFiles()
        self._blocks = blocks_of(form)
        self._slots = [slots_of(block) for block in self._blocks]
        self._behind: dict[int, int] = {}
        self._last: int | None = None
        self._busy = False
        self._entered: set[int] = set()
        self._coming: tuple[int, Future[list[Tensor]]] | None = None
        self._lock, self._thread = RLock(), ThreadPoolExecutor(1, "bringing")
        cuda: Any = torch.cuda  # streams have no types
        self._stream = cuda.Stream(device) if device.type == "cuda" else None
        form.register_forward_pre_hook(lambda module, args: self._begin())
        form.register_forward_hook(lambda module, args, output: self._end(output), always_call=True)
        for number, block in enumerate(self._blocks):
            block.register_forward_pre_hook(lambda module, args, number=number: self._enter(number))
            block.register_forward_hook(lambda module, args, out, number=number: self._leave(number), always_call=True)

    def brought(self, tensor: Tensor) -> Tensor:
        """A weight on the device and in the precision; itself where it is there already."""
        kind = self.dtype if tensor.is_floating_point() else tensor.dtype
        return (
            tensor if tensor.device == self.device and tensor.dtype == kind else tensor.detach().to(self.device, kind)
        )

    def clear(self) -> None:
        """Let go what was brought ahead."""
        if self._coming is not None:
            number, coming = self._coming
            self._coming = None
            coming.result()
            self.log("drop", number)

    def _begin(self) -> None:
        self._lock.acquire()
        if self._busy:  # this thread was interrupted in an evaluation, of which no hook was told
            self._lock.release()
            for number in sorted(self._entered):
                self._leave(number)
        self._busy = True

    def _end(self, output: object) -> None:
        try:
            if output is None:  # it failed on the way
                self._last = None
                self.clear()
        finally:
            self._busy = False
            self._lock.release()

    def _enter(self, number: int) -> None:
        self._entered.add(number)
        tensors = self._arrived(number)
        if self._last is not None:
            self._behind[self._last] = number
        self._last = number
        for slot, tensor in zip(self._slots[number], tensors, strict=True):
            slot.fill(tensor)
        following = self._behind.get(number)
        if following is not None and following != number:
            self._coming = (following, self._start(following))

    def _leave(self, number: int) -> None:
        self._entered.discard(number)
        for slot in self._slots[number]:
            slot.kept[slot.name] = slot.there
        self._files.unwanted(slot.there for slot in self._slots[number])
        self.log("drop", number)

    def _arrived(self, number: int) -> list[Tensor]:
        """The weights of a block: those that were brought ahead, or brought now."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == number:
            tensors = coming[1].result()
        else:
            if coming is not None:
                coming[1].result()
                self.log("drop", coming[0])
            tensors = self._start(number).result()
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return tensors

    def _start(self, number: int) -> "Future[list[Tensor]]":
        """Begin to bring a block. Memory is taken here, so that it is known when; a thread fills it."""
        self.log("bring", number)
        slots = self._slots[number]
        self._files.wanted(slot.there for slot in slots)
        places = [self._place(slot.there) for slot in slots]
        if self._stream is not None:  # what that memory was used for before must be over
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return self._thread.submit(self._filled, slots, places)

    def _place(self, tensor: Tensor) -> Tensor | None:
        """Memory for a weight; None where it needs none, or takes it by itself."""
        kind = self.dtype if tensor.is_floating_point() else tensor.dtype
        if isinstance(tensor, PackedTensor) or (tensor.device.type == self.device.type and tensor.dtype == kind):
            return None
        return torch.empty(tensor.shape, dtype=kind, device=self.device)

    def _filled(self, slots: Sequence[Slot], places: Sequence[Tensor | None]) -> list[Tensor]:
        if self._stream is None:
            return [self._copied(slot.there, place) for slot, place in zip(slots, places, strict=True)]
        with torch.cuda.stream(self._stream):  # reads mapped pages into pinned memory, which the device then copies
            return [self._copied(_pinned(slot.there, place), place) for slot, place in zip(slots, places, strict=True)]

    @torch.no_grad()
    def _copied(self, tensor: Tensor, place: Tensor | None) -> Tensor:
        if place is None:
            return tensor.to(self.device, self.dtype) if isinstance(tensor, PackedTensor) else tensor
        return place.copy_(tensor, non_blocking=True)


def _pinned(tensor: Tensor, place: Tensor | None) -> Tensor:
    """A copy that the device can read by itself, in the precision that is wanted."""
    if place is None or isinstance(tensor, PackedTensor):
        return tensor
    return torch.empty(tensor.shape, dtype=place.dtype, pin_memory=True).copy_(tensor)
