"""How a device is used: precision, threads, and the ways in which layers are computed. Chosen by itself.

On a CPU the layers of a large network are computed in whichever way this processor was measured to be fastest at
(`calibration.py`), once a run is long enough to repay the measuring and the packing. The numbers are those of the plain
network up to the order in which a product is summed up: 1e-5 in float32, about bfloat16's own error there.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from reverie.checkpoint.packed import is_halved, unpacked
from reverie.engine.calibration import Calibration, Cost, Trial, fastest
from reverie.engine.memory import available
from reverie.engine.packs import Packs
from reverie.engine.processor import Processor, threads_for
from reverie.nets import ways
from reverie.nets.attention import ATTENTION, Attend, Layer, attention, gated
from reverie.nets.ways import CONVOLUTION, GATED, LINEAR, ChosenLinear, L, Ready, Way, chosen, onednn_computes

SpeedMode = Literal["auto", "plain"]
MODES = ("auto", "plain")
LARGE = 50_000_000  # parameters of a network; smaller ones draw in seconds as they are
LONG = 8  # evaluations that repay measuring: it takes about as long as one or two
MOST_COUNTED = 64  # evaluations; what is repaid by then is done
UNTOLD = 1 << 32  # bytes for packed weights where the system does not say how much memory is free
# Where nothing was measured:
WIDE = 64 * 64  # pixels of a feature map from which float32 convolutions gain by channels-last
# Channels and pixels, of all calls, from which Winograd's tiles gain more than their weights take to make ready.
DEEP, REPAID = 256, 64 * 64
PRICE = 0.3e-9  # seconds that a byte more is to save at each call: three tenths of a second for a gigabyte
KNOWN_WAYS = "ways 2"  # another where a way of the same name takes another time
SETTLED = ("fused", "packed")  # ways that another must clearly outdo where they take no more memory
WHOLE = "whole"  # halves that were widened
MANY_KEYS = 256  # from which attention by blocks gains where products of bfloat16 are native
M = TypeVar("M", bound=nn.Module)


# Precision


def automatic_precision(
    device: torch.device,
    *,
    large: bool,
    processor: Processor | None = None,
    capability: tuple[int, int] | None = None,
) -> torch.dtype:
    """The precision that a device computes fast and well enough in.

    Args:
        large: whether a network of the model is; small ones stay in float32 on a CPU, where it costs them nothing.
        capability: of a CUDA device: 8.0 (Ampere) multiplies bfloat16, 7.0 (Volta) float16.
    """
    if device.type == "cuda":
        major, _ = capability or torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
    if device.type != "cpu":
        return torch.float16
    native = (processor or Processor.here()).multiplies_bfloat16
    return torch.bfloat16 if large and native else torch.float32


def is_large(network: nn.Module) -> bool:
    """Whether a network takes so long that it matters how it is computed."""
    return sum(p.numel() for p in network.parameters()) >= LARGE


def layout_for(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """The order of convolutions' weights in memory: channels last where a GPU's matrix units want it."""
    halves = device.type == "cuda" and dtype != torch.float32
    return torch.channels_last if halves else torch.preserve_format


# Ways


class Speed:
    """How the networks of a model are computed on a device.

    Args:
        mode: `plain` for torch's usual call at every layer.
        calibration: None for the user's own.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        mode: SpeedMode = "auto",
        *,
        processor: Processor | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.device, self.dtype, self.mode = device, dtype, mode
        self.processor = processor or Processor.here()
        self.packs = Packs(lambda: available(device) // 2 or UNTOLD)
        self._calibration = calibration
        self._forms: WeakKeyDictionary[nn.Module, dict[int, nn.Module | None]] = WeakKeyDictionary()

    @property
    def acts(self) -> bool:
        """Whether there is anything to choose: on a CPU, unless it is not wanted."""
        return self.mode == "auto" and self.device.type == "cpu"

    @property
    def calibration(self) -> Calibration:
        """What is known of this machine with the threads that there are now."""
        if self._calibration is None:
            self._calibration = Calibration.of_environment(
                f"{self.processor.name}, {self.processor.cores} cores, torch {torch.__version__}, {KNOWN_WAYS}"
            )
        return self._calibration

    def describe(self) -> str:
        """The plan in one line."""
        precision = str(self.dtype).removeprefix("torch.")
        if self.device.type != "cpu":
            last = layout_for(self.device, self.dtype) == torch.channels_last
            return f"{self.device}: {precision}, fused attention" + ", channels-last convolutions" * last
        where = f"{self.processor.name}: {precision}, {torch.get_num_threads()} threads"
        packed = "packed for oneDNN" if onednn_computes(self.dtype) else "not packed"
        return f"{where}, " + (f"large networks as measured here, {packed} where it pays" if self.acts else "plain")

    def settle_threads(self) -> None:
        """Compute on physical cores alone, on a CPU, where the user does not say otherwise."""
        if self.acts:
            present = torch.get_num_threads()
            wanted = threads_for(self.processor.cores, present, os.environ)
            if wanted != present:
                torch.set_num_threads(wanted)

    def halves(self, network: nn.Module) -> int | None:
        """Numbers of a weight from which halves that stand for numbers of another type stay so; None where none do."""
        wide = self.dtype != torch.float16  # which does not hold all that bfloat16 does
        return ways.LEAST if self.acts and wide and is_large(network) else None

    def form(self, network: M, evaluations: int = 1) -> M:
        """The form of a ready network that computes in the ways chosen; itself where there is nothing to choose.

        Args:
            evaluations: about how often it will be asked; forms of about as many are one, and are kept.
        """
        if not self.acts:
            return network
        calls = 1 << (min(max(evaluations, 1), MOST_COUNTED).bit_length() - 1)
        own = self._forms.setdefault(network, {})
        if calls not in own:
            own[calls] = chosen(network, ByCost(self, calls), is_ready) if is_large(network) else None
        found = own[calls]
        if found is None:  # it is not kept as its own form, or it would never go
            return network
        assert isinstance(found, type(network))
        return found

    def forget(self) -> None:
        """Let go every form: networks are brought anew, and may have other weights then (unpacked ones)."""
        self._forms.clear()


@dataclass(frozen=True)
class Choice(Generic[L]):
    """How a layer is computed for inputs of some shape.

    Attributes:
        first: the way that is fastest for one call alone: no weight is made ready that this call does not repay.
        later: the fastest for all the others.
        spare: for want of room.
        known: whether it was measured which way is the fastest.
    """

    first: Way[L]
    later: Way[L]
    spare: Way[L]
    known: bool


class ByCost:
    """Computes layers in the way that costs the least for so many calls (`nets.ways.Chooser`).

    The first call of every layer for inputs of some shape is one of its own kind: whoever waits for the first step does
    not wait until ways are measured and weights are ready for all the others.

    Args:
        calls: of every layer.
    """

    def __init__(self, speed: Speed, calls: int) -> None:
        self._speed, self._calls = speed, calls
        self._choices: dict[tuple[object, ...], Any] = {}
        self._attention: dict[tuple[object, ...], Attend] = {}
        self._guessed: set[tuple[object, ...]] = set()  # of those
        self._met: WeakKeyDictionary[nn.Module, set[tuple[object, ...]]] = WeakKeyDictionary()
        self._again = False  # whether the latest layer was met again: the first step is over

    def __deepcopy__(self, memo: object) -> "ByCost":
        return self  # copies of a network (tiles) share what is known and packed

    def linear(self, layer: nn.Linear, x: Tensor, to: Tensor | None = None) -> Tensor:
        """What `nn.Linear` says, added to `to`."""
        key = ("linear", x.numel() // x.shape[-1], *layer.weight.shape, x.dtype)
        return self._computed(key, LINEAR, layer, x, lambda calls: LINEAR[0], to)

    def gated(self, layer: Layer, x: Tensor) -> Tensor:
        """What `nets.attention.gated` says."""
        if not isinstance(layer, ChosenLinear):  # a LoRA stands beside it, say
            return gated(layer, x)
        key = ("gated", x.numel() // x.shape[-1], *layer.weight.shape, x.dtype)
        return self._computed(key, GATED, layer, x, partial(_guessed_gate, layer, x))

    def convolution(self, layer: nn.Conv2d, x: Tensor, to: Tensor | None = None) -> Tensor:
        """What `nn.Conv2d` says, added to `to`."""
        if x.dtype != torch.float32:  # in this order all that comes after it is fastest, too
            x = x.contiguous(memory_format=torch.channels_last)
        last = x.is_contiguous(memory_format=torch.channels_last)
        shape = (*x.shape, *layer.weight.shape, *layer.stride, *layer.padding, *layer.dilation, layer.groups)
        guess = partial(_guessed_convolution, layer, x)
        return self._computed(("convolution", *shape, last, x.dtype), CONVOLUTION, layer, x, guess, to)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What `nets.attention.attention` says."""
        if q.requires_grad or k.requires_grad or v.requires_grad:
            return attention(q, k, v)
        key = ("attention", *q.shape, k.shape[2], q.dtype)
        if key not in self._attention or (key in self._guessed and self._again and self._long):
            self._attention[key] = self._attending(key, q, k, v)
        return self._attention[key](q, k, v)

    def _attending(self, key: tuple[object, ...], q: Tensor, k: Tensor, v: Tensor) -> Attend:
        """By what is known or is measured now, else a guess."""
        trials = {name: _attention_trial(way, q, k, v) for name, way in ATTENTION.items()}
        if costs := self._costs(key, trials, measure=self._again):
            self._guessed.discard(key)
            return ATTENTION[fastest(costs, "fused", self._calls)]
        self._guessed.add(key)
        native = q.dtype == torch.bfloat16 and self._speed.processor.multiplies_bfloat16
        return ATTENTION["blocks" if native and k.shape[2] >= MANY_KEYS else "fused"]

    def _computed(
        self,
        key: tuple[object, ...],
        known: Sequence[Way[L]],
        layer: L,
        x: Tensor,
        guess: Callable[[int], Way[L]],
        to: Tensor | None = None,
    ) -> Tensor:
        """What a layer says, in the way of its shape; in the usual way where gradients are wanted or types differ."""
        weight = layer.weight
        trained = x.requires_grad or (to is not None and to.requires_grad)
        if x.dtype != weight.dtype or trained or not is_ready(weight):
            return known[0].plus(layer, x, weight, to)
        met = self._met.setdefault(layer, set())
        again = self._again = key in met
        met.add(key)
        choice: Choice[L] | None = self._choices.get(key)
        if choice is None or (again and not choice.known and self._long):
            choice = self._choices[key] = self._choice(key, known, layer, x, guess, measure=again)
        way = choice.later if again else choice.first
        ready = self._ready(way, key, layer, x) if way.prepare else self._whole(weight, keep=choice.later is way)
        if ready is None:  # no room for it
            way, ready = choice.spare, self._whole(weight, keep=True)
        return way.plus(layer, x, ready, to)

    def _choice(
        self,
        key: tuple[object, ...],
        known: Sequence[Way[L]],
        layer: L,
        x: Tensor,
        guess: Callable[[int], Way[L]],
        *,
        measure: bool,
    ) -> Choice[L]:
        """By what is known of the ways or is measured now, else a guess."""
        usual, usable = known[0], {way.name: way for way in known if way.usable(layer, x)}
        costs = self._costs(key, {name: _trial(way, layer, x) for name, way in usable.items()}, measure=measure)
        for name, cost in costs.items():
            costs[name] = replace(cost, call=cost.call + PRICE * _more(usable[name], layer.weight))

        def best(usual: str, calls: int) -> Way[L]:
            return usable[fastest(costs, usual, calls)] if costs else guess(calls)

        guessed = guess(self._calls)
        # Halves have to be made into numbers of another type anyhow, so that packing them costs nothing besides.
        settled = next((name for name in SETTLED if name in usable and is_halved(layer.weight)), usual.name)
        first, later = best(usual.name, 1), best(settled, self._calls)
        first = later if first.prepare and later.prepare else first  # two ready weights would be one too many
        return Choice(first, later, guessed if guessed.prepare is None else usual, known=bool(costs))

    def _ready(self, way: Way[L], key: tuple[object, ...], layer: L, x: Tensor) -> Ready | None:
        """The weight as a way wants it; None where there is no room for it."""
        weight, prepare = layer.weight, way.prepare
        assert prepare is not None
        made_for = way.name if way.anywhere else (way.name, *key)
        return self._speed.packs.get(weight, made_for, lambda: prepare(layer, unpacked(weight), x), way.growth)

    def _whole(self, weight: Tensor, *, keep: bool) -> Tensor:
        """The numbers of a weight; halves are widened, once if they are kept so."""
        if keep and is_halved(weight):
            kept = self._speed.packs.get(weight, WHOLE, lambda: unpacked(weight))
            if isinstance(kept, Tensor):
                return kept
        whole: Tensor = unpacked(weight)
        return whole

    @property
    def _long(self) -> bool:
        """Whether a run repays measuring."""
        return self._calls >= LONG

    def _costs(self, key: tuple[object, ...], trials: Mapping[str, Trial], *, measure: bool) -> dict[str, Cost]:
        """What each way costs; empty where that is not known, and the run too short to find out or only begun."""
        shape = f"{torch.get_num_threads()} threads, {' '.join(map(str, key))}"
        calibration = self._speed.calibration
        costs = calibration.measured(shape, trials) if measure and self._long else calibration.known(shape)
        return {name: costs[name] for name in trials} if trials.keys() <= costs.keys() else {}


def _more(way: Way[L], weight: Tensor) -> float:
    """Bytes that a way takes beyond those of the weight itself."""
    if way.prepare is None:
        return 0.0
    return (way.growth - is_halved(weight)) * weight.nbytes


def _guessed_convolution(layer: nn.Conv2d, x: Tensor, calls: int) -> Way[nn.Conv2d]:
    usable = {way.name: way for way in CONVOLUTION if way.usable(layer, x)}
    pixels, channels = x.shape[-1] * x.shape[-2], min(layer.in_channels, layer.out_channels)
    if x.dtype != torch.float32:
        return usable["packed" if calls > 1 and "packed" in usable else "plain"]
    if "winograd" in usable and channels >= DEEP and calls * len(x) * pixels >= REPAID:
        return usable["winograd"]
    return usable["channels_last" if pixels >= WIDE and "channels_last" in usable else "plain"]


def _guessed_gate(layer: nn.Linear, x: Tensor, calls: int) -> Way[nn.Linear]:
    return next((way for way in GATED if way.name == "onednn" and way.usable(layer, x)), GATED[0])


def is_ready(weight: Tensor) -> bool:
    """Whether a weight can be computed with: plain, or halves that stand for it, and not to be trained."""
    return ways.is_plain(weight) or (is_halved(weight) and not weight.requires_grad)


def _trial(way: Way[L], layer: L, x: Tensor) -> Trial:
    """One layer's call."""

    def prepare() -> Ready:
        weight: Tensor = unpacked(layer.weight)
        return weight if way.prepare is None else way.prepare(layer, weight, x)

    return Trial(lambda weight: way.run(layer, x, weight), prepare)


def _attention_trial(way: Attend, q: Tensor, k: Tensor, v: Tensor) -> Trial:
    return Trial(lambda _: way(q, k, v), lambda: q)
