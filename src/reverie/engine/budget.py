"""A plan before running: what will be computed, where weights and activations are, and what is done to fit a limit.

The memory of a picture is that of its hardest moment: the weights that are in place then, what is alive around the
network, and what the network holds while it computes. Measures against too much of it are tried from the cheapest to
the dearest, and those that turn out not to be needed are taken back.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from reverie.checkpoint.packed import PackedTensor, is_packed, numbers_of
from reverie.checkpoint.quantised import HALVES
from reverie.checkpoint.quantising import Quantisation, quantisable, quantisation_of, quantised_size
from reverie.engine.blockwise import blocks_of, slots_of
from reverie.engine.forecast import FUSED
from reverie.engine.mapped import MappedFiles
from reverie.engine.measures import TILES, Measures, shown
from reverie.engine.packs import Packs
from reverie.engine.rehearsal import Prepare, Rehearsal, rehearse
from reverie.engine.request import Request
from reverie.engine.speed import is_large
from reverie.errors import RequestError
from reverie.nets.unet import UNet

if TYPE_CHECKING:
    from reverie.engine.bundle import Model

REFINER = "refiner "
NETWORKS = ("unet", f"{REFINER}unet")
OWN_PRECISION = {"upscaler", "tiny decoder"}  # they compute in float32 whatever the model does
SLICES = (1024, 256)  # queries of an attention layer


@dataclass(frozen=True)
class Held:
    """Bytes of weights.

    Attributes:
        own: memory that nobody can take back: the device's, or the program's own.
        mapped: pages of files, which the system's cache holds and takes back when memory is wanted.
        extra: what is unpacked of packed weights while a layer computes.
    """

    own: int = 0
    mapped: int = 0
    extra: int = 0

    def __add__(self, other: "Held") -> "Held":
        return Held(self.own + other.own, self.mapped + other.mapped, max(self.extra, other.extra))

    @property
    def total(self) -> int:
        """All of it."""
        return self.own + self.mapped + self.extra


@dataclass(frozen=True)
class Part:
    """A network in the plan.

    Attributes:
        name: of its folder; `vae decoder` and `vae encoder` share the weights of `vae`.
        place: `cpu`, `cuda:0`...; with `by blocks` where its blocks are brought one after the other.
        precision: that it computes in.
        evaluations: how often it is asked, of all pictures.
        flops: of all evaluations, by kind.
        activations: bytes at most while it computes.
        weights: those in place then.
    """

    name: str
    place: str
    precision: str
    evaluations: float
    flops: dict[str, float]
    activations: int
    weights: Held

    @property
    def tflop(self) -> float:
        """Work in 10^12 floating point operations."""
        return sum(self.flops.values()) / 1e12


@dataclass(frozen=True)
class Plan:
    """What drawing a request takes.

    Attributes:
        parts: in the order in which they are first asked.
        measures: what is done to need less memory.
        own: bytes at most beside what the program has before: the device's, or on a CPU the program's own.
        mapped: bytes of mapped files in place at that moment.
        hardest: the part whose evaluation that is.
        packs: bytes that the fastest ways to compute may take besides, where they are free (`engine/packs.py`).
        batch: pictures drawn at once.
        tile: pixels of the VAE's tiles; None for one piece.
        limit: that was asked for.
        device, family: where, and of which kind the model is.
    """

    parts: tuple[Part, ...]
    measures: Measures
    own: int
    mapped: int
    hardest: str
    packs: int
    batch: int
    tile: int | None
    limit: int | None
    device: str
    family: str

    @property
    def total(self) -> int:
        """What is compared with the limit: own memory and mapped files."""
        return self.own + self.mapped

    @property
    def flops(self) -> dict[str, float]:
        """Of all parts, by kind."""
        found: dict[str, float] = {}
        for part in self.parts:
            for kind, flops in part.flops.items():
                found[kind] = found.get(kind, 0.0) + flops
        return found


def fit(model: "Model", request: Request, limit: int, prepare: Prepare, *, last: bool = False) -> Plan:
    """Choose the measures under which a resolved request stays below a limit, and put them in place.

    Args:
        last: see `generate.batches`.

    Raises:
        RequestError: not even the leanest way does.
    """
    plan = planned(model, request, prepare, limit, last=last)
    if plan.measures != model.measures and (words := plan.measures.words()):
        warnings.warn(f"to stay below {shown(limit)}: {', '.join(words)}", stacklevel=3)
    model.measures = plan.measures
    model.speed.packs = Packs(lambda: max(limit - plan.total, 0))
    return plan


def planned(
    model: "Model", request: Request, prepare: Prepare, limit: int | None = None, *, last: bool = False
) -> Plan:
    """The plan of a resolved request: the first measures that fit below the limit, none where there is no limit.

    Args:
        last: see `generate.batches`.

    Raises:
        RequestError: not even the leanest way does.
    """
    planner = Planner(model, request, prepare, limit, last=last)
    plan = planner.plan(Measures())
    if limit is None or plan.total <= limit:
        return plan
    taken: list[dict[str, Any]] = []
    for change in planner.ladder():
        taken = [other for other in taken if other.keys() != change.keys()] + [change]
        plan = planner.plan(_with(taken))
        if plan.total <= limit:
            return _pruned(planner, taken, limit)
    raise RequestError(
        f"memory is limited to {shown(limit)}, and this request takes {shown(plan.total)} at least ({plan.hardest}); "
        "raise the limit, or draw a smaller picture"
    )


def _with(changes: Sequence[dict[str, Any]]) -> Measures:
    return Measures(**{name: value for change in changes for name, value in change.items()})


def _pruned(planner: "Planner", taken: list[dict[str, Any]], limit: int) -> Plan:
    """Without those measures that are not needed, the dearest of them first."""
    for change in reversed(taken[:-1]):
        fewer = [other for other in taken if other is not change]
        if planner.plan(_with(fewer)).total <= limit:
            taken = fewer
    return planner.plan(_with(taken))


class Planner:
    """Plans of one request under different measures.

    Args:
        prepare: see `rehearsal.rehearse`.
        last: see `generate.batches`.
    """

    def __init__(
        self, model: "Model", request: Request, prepare: Prepare, limit: int | None, *, last: bool = False
    ) -> None:
        self._model, self._request, self._prepare, self._limit, self._last = model, request, prepare, limit, last
        self._files = MappedFiles()
        self._plans: dict[Measures, Plan] = {}

    def ladder(self) -> Iterator[dict[str, Any]]:
        """Measures that this request and this model can take, the cheapest first."""
        request, model = self._request, self._model
        size = min(request.batch_size, request.count)
        while size > 1 and request.travel is None:
            size = (size + 1) // 2
            yield {"batch": size}
        if request.seamless == "none" and request.vae_tile is None and request.decoder == "full":
            yield from ({"tile": pixels} for pixels in TILES)
        yield {"offload": True}
        if any(is_packed(module) for module in model.parts.modules().values()) and not model.lasting.packed:
            yield {"packed": True}
        if self._can_block:
            yield {"offload": True, "blocks": True}
        if model.device.type not in FUSED and isinstance(model.parts.unet, UNet):  # elsewhere no scores are kept
            yield from ({"slices": rows} for rows in SLICES)

    def plan(self, measures: Measures) -> Plan:
        """The plan under some measures."""
        if measures not in self._plans:
            self._plans[measures] = self._plan(measures)
        return self._plans[measures]

    @property
    def _can_block(self) -> bool:
        """Whether blocks can be brought one by one: LoRAs, seamless forms and quantised weights want whole networks."""
        if self._request.seamless != "none" or self._quantisation(self._model.parts.network) is not None:
            return False
        rehearsal = rehearse(self._model, self._request, self._prepare, self._model.works)
        return not rehearsal.loras

    def _plan(self, measures: Measures) -> Plan:
        model, request = self._model, self._request
        rehearsal = rehearse(model, request, self._prepare, model.works, measures)
        networks = self._networks(rehearsal)
        held = {name: self._held(name, module, rehearsal, measures) for name, module in networks.items()}
        own, mapped, hardest = self._hardest(rehearsal, held, alone=measures.offload or model.lasting.offload)
        parts = {call.part: self._part(call.part, rehearsal, held, measures) for call in rehearsal.calls}
        batch = min(request.batch_size, request.count, measures.batch or request.batch_size)
        tile = measures.tile if request.vae_tile is None else request.vae_tile or None
        return Plan(
            tuple(parts.values()), measures, own, mapped, hardest, self._packs(rehearsal, networks, measures),
            1 if request.travel else batch, tile, self._limit, str(model.device), model.parts.identity.family,
        )  # fmt: skip

    def _hardest(self, rehearsal: Rehearsal, held: dict[str, Held], *, alone: bool) -> tuple[int, int, str]:
        """Own memory and mapped files of the hardest moment, and what computes then.

        Args:
            alone: one part of the model at a time is in place.
        """
        found, placed = (0, 0, ""), Held()
        there: dict[str, Held] = {}
        names = [weights_of(call.part) for call in rehearsal.calls]
        for number, (name, call) in enumerate(zip(names, rehearsal.calls, strict=True)):
            if self._goes_early and not any(later in NETWORKS for later in names[number:]):
                there = {other: weights for other, weights in there.items() if other not in NETWORKS}
            if alone and name not in there and not _stays(name):
                there = {other: weights for other, weights in there.items() if _stays(other)}
            there[name] = held[name]
            placed = sum(there.values(), Held())
            now = (placed.own + placed.extra + call.live + call.work.peak, placed.mapped, call.part)
            found = max(found, now, key=lambda moment: moment[0] + moment[1])
        end = (placed.own + rehearsal.around, placed.mapped, "the finished pictures")
        return max(found, end, key=lambda moment: moment[0] + moment[1])

    @property
    def _goes_early(self) -> bool:
        """Whether the denoising network is gone when the first picture is decoded."""
        request = self._request
        return self._last and request.travel is None and request.count <= request.batch_size

    def _networks(self, rehearsal: Rehearsal) -> dict[str, nn.Module]:
        """Every network that is asked, by the name of its weights."""
        known: dict[str, nn.Module] = {**self._model.parts.modules(), **rehearsal.networks}
        if self._request.refine is not None:
            other = self._model.successor(self._request.refine.model)
            known |= {f"{REFINER}{name}": module for name, module in other.parts.modules().items()}
        names = {weights_of(call.part) for call in rehearsal.calls} | rehearsal.networks.keys()
        return {name: module for name, module in known.items() if name in names}

    def _held(self, name: str, module: nn.Module, rehearsal: Rehearsal, measures: Measures) -> Held:
        """The weights of a network while it computes."""
        lora = Held(rehearsal.loras.get(name, 0))
        blocks = [slots_of(block) for block in blocks_of(module)] if measures.blocks and not _stays(name) else []
        if not blocks and (kind := self._quantisation(name)) is not None:
            return self._quantised(module, name, kind, measures) + lora
        if not blocks:
            return self._bytes((slot.there for slot in slots_of(module)), name, measures) + lora
        inside = {id(slot.kept) for slots in blocks for slot in slots}
        rest = self._bytes((s.there for s in slots_of(module) if id(s.kept) not in inside), name, measures)
        each = (self._bytes((slot.there for slot in slots), name, measures, brought=True) for slots in blocks)
        return sum(sorted(each, key=lambda one: one.total)[-2:], rest) + lora  # one computes, the next is brought

    def _quantisation(self, name: str) -> Quantisation | None:
        """To which the weights of a network are quantised when it is placed."""
        return None if _stays(name) else quantisation_of(name.removeprefix(REFINER), self._model.weights)

    def _quantised(self, module: nn.Module, name: str, kind: Quantisation, measures: Measures) -> Held:
        """Of a network whose weights are quantised."""
        weights = {id(layer.weight): layer.weight for layer in quantisable(module)}
        rest = (slot.there for slot in slots_of(module) if id(slot.there) not in weights)
        own = sum(quantised_size(weight, kind) for weight in weights.values())
        extra = max((weight.numel() * (4 + self._model.dtype.itemsize) for weight in weights.values()), default=0)
        return self._bytes(rest, name, measures) + Held(own, extra=extra)

    def _bytes(self, tensors: Iterable[Tensor], name: str, measures: Measures, *, brought: bool = False) -> Held:
        """Of weights that are placed as `engine/placing.py` does, or brought as `engine/blockwise.py` does."""
        model, own, mapped, extra = self._model, 0, 0, 0
        least = None if brought else self._least_halves(name)
        for tensor in tensors:
            dtype = model.dtype if tensor.is_floating_point() else tensor.dtype
            there = self._files.holds(tensor)
            packed = isinstance(tensor, PackedTensor) and (brought or measures.packed or model.lasting.packed)
            size = _stored(tensor) if packed else tensor.numel() * dtype.itemsize
            moves = model.device.type != "cpu" or (
                not packed and (isinstance(tensor, PackedTensor) or tensor.dtype != dtype)
            )
            if name in OWN_PRECISION:
                size, moves = tensor.nbytes, model.device.type != "cpu"
            halves = moves and numbers_of(tensor).dtype in HALVES.values()
            if least is not None and there and halves and tensor.numel() >= least:
                size, moves = _stored(tensor), False
                extra = max(extra, tensor.numel() * dtype.itemsize)
            if moves or not there:
                own += size
                mapped += _stored(tensor) if brought and there else 0
            else:
                mapped += size
            extra = max(extra, tensor.numel() * (4 + dtype.itemsize) if packed else 0)
        return Held(own, mapped, extra)

    def _least_halves(self, name: str) -> int | None:
        """Numbers of a weight from which halves are widened at each use and not kept so: in large text encoders."""
        part = name.removeprefix(REFINER)
        module = self._model.parts.modules().get(part)
        return None if module is None or part in {"unet", "vae"} else self._model.speed.halves(module)

    def _part(self, name: str, rehearsal: Rehearsal, held: dict[str, Held], measures: Measures) -> Part:
        calls = [call for call in rehearsal.calls if call.part == name]
        flops: dict[str, float] = {}
        for call in calls:
            for kind, count in call.work.flops.items():
                flops[kind] = flops.get(kind, 0.0) + call.times * count
        weights = weights_of(name)
        by_blocks = measures.blocks and not _stays(weights) and bool(blocks_of(self._networks(rehearsal)[weights]))
        return Part(
            name, str(self._model.device) + " by blocks" * by_blocks, self._precision(weights),
            sum(call.times for call in calls), flops, max(call.work.peak for call in calls), held[weights],
        )  # fmt: skip

    def _precision(self, name: str) -> str:
        return "float32" if name in OWN_PRECISION else str(self._model.dtype).removeprefix("torch.")

    def _packs(self, rehearsal: Rehearsal, networks: dict[str, nn.Module], measures: Measures) -> int:
        """What weights in the order of the fastest ways to compute may take besides, where memory is free."""
        if measures.blocks or not self._model.speed.acts:
            return 0
        large = [module for name, module in networks.items() if not _stays(name) and is_large(module)]
        size = sum(p.numel() for module in large for p in module.parameters()) * self._model.dtype.itemsize
        return size if self._limit is None else min(size, self._limit)


def weights_of(part: str) -> str:
    """The network whose weights a part of the plan computes with."""
    name = part.removesuffix(" (picture)")
    return (
        name.removesuffix(" decoder").removesuffix(" encoder")
        if name.endswith(("vae decoder", "vae encoder"))
        else name
    )


def _stays(name: str) -> bool:
    """Whether a network stays in place when others are needed: those that are no part of a model."""
    return name in OWN_PRECISION or name.startswith(("control: ", "image prompt: "))


def _stored(tensor: Tensor) -> int:
    """Bytes of the numbers as they are stored."""
    return numbers_of(tensor).nbytes
