"""What a computation will cost, without doing it: its work and its memory, counted on torch's meta device.

The networks themselves run, with tensors that have shapes and no numbers. A dispatch mode sees every operation: its
floating point operations come from torch's own table (`torch.utils.flop_counter`), its memory from the lifetimes of the
storages it makes. Nothing here knows what a network looks like.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

KINDS = ("convolution", "linear", "attention")
"""Of work: each runs at a rate of its own."""
FUSED = {"cpu", "cuda"}  # devices whose attention keeps no scores
aten = torch.ops.aten
ALIKE = {aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.silu.default, aten.gelu.default}
"""Operations whose result is like their first argument, where the second is no larger."""


@dataclass(frozen=True)
class Work:
    """What a computation costs.

    Attributes:
        flops: floating point operations by kind (`KINDS`); a multiplication and the addition after it are two.
        peak: bytes that it makes and holds at most at one time, beside its inputs and the weights.
        kept: bytes that are still held when it is done, its result among them.
    """

    flops: Mapping[str, int] = field(default_factory=dict)
    peak: int = 0
    kept: int = 0

    @property
    def total(self) -> int:
        """Floating point operations of all kinds."""
        return sum(self.flops.values())

    def also(self, other: "Work") -> "Work":
        """Both, one after the other."""
        return Work(Counter(self.flops) + Counter(other.flops), max(self.peak, self.kept + other.peak), self.kept)

    def times(self, count: float) -> "Work":
        """The same so many times, one after the other."""
        return Work({kind: round(count * flops) for kind, flops in self.flops.items()}, self.peak, self.kept)


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered: what is computed, and which of the storages made under it are still alive.

    Attributes:
        flops: floating point operations so far, by kind.
        live, peak: bytes now, and at most so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[str] = Counter()
        self.live = self.peak = 0
        self._known: set[int] = set()
        self._aside = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled under it; guarding against that would import torch's compiler, which takes seconds."""
        return False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside does not count."""
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count it."""
        given = kwargs or {}
        if self._aside:
            return func(*args, **given)
        out = _computed(func, args, given)
        flops = self._flops(func, args, given, out)
        if flops:
            self.flops[_kind(func)] += flops
        self._made(out, (args, given))
        return out

    @contextmanager
    def within(self) -> Iterator[list[Work]]:
        """What is done inside: one `Work`, in the list when it is over."""
        flops, live, peak = self.flops, self.live, self.peak
        self.flops, self.peak = Counter(), live
        found: list[Work] = []
        try:
            yield found
        finally:
            found.append(Work(dict(self.flops), self.peak - live, self.live - live))
            self.flops, self.peak = flops + self.flops, max(peak, self.peak)

    def _flops(self, func: Any, args: Any, given: Any, out: Any) -> int:
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            return int(sdpa_flop_count(*(t.shape for t in args[:3])))  # type: ignore[no-untyped-call]
        formula = flop_registry.get(func.overloadpacket)
        return int(formula(*args, **given, out_val=out)) if formula else 0

    def _made(self, out: Any, inputs: Any) -> None:
        before: set[int] | None = None
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            if before is None:
                before = {t.untyped_storage()._cdata for t in tree_leaves(inputs) if isinstance(t, Tensor)}
            if key not in before:
                self._known.add(key)
                self._grown(storage.nbytes())
                weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _grown(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Fused(TorchFunctionMode):
    """Attention as devices with a fused kernel do it: without keeping the scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Put the fused operation in the place of attention on the meta device."""
        given = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            named = {"attn_mask": given.get("attn_mask"), "scale": given.get("scale")}
            causal = given.get("is_causal", False)
            return aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], is_causal=causal, **named)[0]
        return func(*args, **given)


def counted(function: Callable[[], T], tally: Tally | None = None, *, device: str = "cpu") -> tuple[T, Work]:
    """Run `function`, without gradients, and count.

    Args:
        tally: one that is entered already.
        device: for which it is counted, where its tensors are on the meta device.
    """
    if tally is None:
        with Tally() as own:
            return counted(function, own, device=device)
    with torch.no_grad(), tally.within() as found:
        if device in FUSED:
            with Fused():
                result = function()
        else:
            result = function()
    return result, found[0]


def twin(module: M, dtype: torch.dtype) -> M:
    """A copy of a network on the meta device, in the precision that it computes in. Reads no weight."""
    known: dict[int, object] = {}
    for p in module.parameters():
        empty = torch.empty(p.shape, dtype=dtype if p.is_floating_point() else p.dtype, device="meta")
        known[id(p)] = nn.Parameter(empty, requires_grad=False)
    for b in module.buffers():
        known[id(b)] = torch.empty(b.shape, dtype=dtype if b.is_floating_point() else b.dtype, device="meta")
    return copy.deepcopy(module, known)


def to_meta(value: T) -> T:
    """The same with every tensor in it on the meta device."""
    found: T = tree_map_only(
        Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), value
    )
    return found


def _computed(func: Any, args: Any, given: Any) -> Any:
    """The result of one operation.

    Of some on the meta device it is made here: torch would find its shape in several layers of Python, which is most of
    the time that counting takes.
    """
    first = args[0] if args else None
    if isinstance(first, Tensor) and first.is_meta and first.is_floating_point():
        if func in ALIKE and all(_fits(second, first) for second in args[1:2]):
            return torch.empty_like(first)
        if func is aten.native_group_norm.default:
            return torch.empty_like(first), *(first.new_empty(args[3], args[6]) for _ in "mr")
        if func is aten.native_layer_norm.default:
            rows = (*first.shape[: -len(args[1])], *[1] * len(args[1]))
            return torch.empty_like(first), *(first.new_empty(rows) for _ in "mr")
    return func(*args, **given)


def _fits(second: Any, first: Tensor) -> bool:
    """Whether an operation on both gives something like the first."""
    if not isinstance(second, Tensor):
        return isinstance(second, int | float)
    ends = zip(reversed(first.shape), reversed(second.shape), strict=False)
    return second.dtype == first.dtype and second.ndim <= first.ndim and all(b in (a, 1) for a, b in ends)


def _kind(func: Any) -> str:
    name = func.__name__
    if "attention" in name or "bmm" in name:
        return "attention"
    return "convolution" if "convolution" in name else "linear"
