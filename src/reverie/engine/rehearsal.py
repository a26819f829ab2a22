"""A picture drawn without its networks: the same code draws it, and the networks only count.

Whatever a request asks for (passes, guides, schedules of prompts, tiles, a refiner) is counted because it is done: the
sampler runs, guidance asks, and every network answers with a tensor of the right shape. What a network would have cost
is found once for each shape that it is given (`engine/forecast.py`). No weight of the model is read.
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from reverie.adapters.attach import Attachment, Way, changed, changes_of
from reverie.engine import latents as latent_space
from reverie.engine.compiling import Compiler
from reverie.engine.drawing import Job, Kit, Picture, drawn
from reverie.engine.forecast import Tally, Work, counted, to_meta, twin
from reverie.engine.measures import Measures, Works
from reverie.engine.opened import Opened
from reverie.engine.preview import TinyPreview
from reverie.engine.request import Request
from reverie.engine.upscale import Upscaler, open_upscaler
from reverie.families.base import Tower
from reverie.nets.attention import Attention
from reverie.nets.controlnet import ControlNet
from reverie.text.embed import Encoding, Tokens
from reverie.types import BeyondTap, Taps

if TYPE_CHECKING:
    from reverie.engine.bundle import Model

T = TypeVar("T")
Prepare: TypeAlias = "Callable[[Model, Request, type[Kit]], tuple[Job, list[list[Picture]]]]"
"""What is drawn for a resolved request, and in which groups (`generate.prepared`)."""


@dataclass(frozen=True)
class Call:
    """One evaluation of a network.

    Attributes:
        part: `text_encoder`, `unet`, `vae decoder`, `vae encoder`, `control: NAME`, `upscaler`...
        work: what it costs.
        rows: the batch that it is given.
        live: bytes of everything else that is alive then: latents, prompts, what is kept from step to step.
        times: how often, where one stands for several.
    """

    part: str
    work: Work
    rows: int
    live: int
    times: float = 1.0


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """What drawing a request would do.

    Attributes:
        calls: of all pictures, in their order; those of equal groups once, with `times`.
        around: bytes alive at most outside of networks: when pictures are finished, for example.
        loras: bytes of weights that LoRAs make anew, by part.
        networks: those that are needed beside the model's own, by part.
    """

    calls: tuple[Call, ...]
    around: int
    loras: dict[str, int]
    networks: dict[str, nn.Module]


def rehearse(
    model: "Model", request: Request, prepare: Prepare, works: Works, measures: Measures | None = None
) -> Rehearsal:
    """Draw a resolved request with networks that only count.

    Args:
        works: what is known already; is added to.
        measures: under which it would be drawn; none if None.
    """
    with Tally() as tally:
        stage = Stage(tally, works, measures or Measures(), model.device.type)
        stand_in = Understudy(model, request, stage)
        job, groups = prepare(cast("Model", stand_in), _answerable(request), _BareKit)
        for group in _different(groups):
            times, before = sum(len(other) == len(group) for other in groups), len(stage.calls)
            drawn(job, group)
            stage.calls[before:] = [replace(call, times=times * call.times) for call in stage.calls[before:]]
    return Rehearsal(tuple(stage.calls), tally.peak, stage.loras, stage.networks)


def _different(groups: list[list[Picture]]) -> list[list[Picture]]:
    """One group of every length."""
    return list({len(group): group for group in groups}.values())


def _answerable(request: Request) -> Request:
    """Guidance that reads the maps of layers has none to read here; perturbed attention asks as often."""
    guides = tuple(
        guide.model_copy(update={"name": "pag", "options": {}}) if guide.name in {"sag", "self_attention"} else guide
        for guide in request.guides
    )
    return request.model_copy(update={"guides": guides})


class _BareKit(Kit):
    """A kit whose adapters are told to the understudy, and do nothing besides."""

    def attachments(self, text: str) -> tuple[Attachment, ...]:
        """None; see `Kit`."""
        cast("Understudy", self._model).wear(self._named_by(text))
        return ()

    def steering(self, width: int, height: int) -> None:
        """None; see `Kit`."""


@dataclass(frozen=True)
class Shape:
    """Of a tensor that a network has answered."""

    size: tuple[int, ...]
    dtype: torch.dtype

    def ones(self) -> Tensor:
        """A tensor of that shape."""
        return torch.ones(self.size, dtype=self.dtype)


class Stage:
    """Where networks stand that only count.

    Attributes:
        calls: what they were asked.
        loras, networks: see `Rehearsal`.
    """

    def __init__(self, tally: Tally, works: Works, measures: Measures, device: str) -> None:
        self.tally, self.works, self.measures, self.device = tally, works, measures, device
        self.calls: list[Call] = []
        self.loras: dict[str, int] = {}
        self.networks: dict[str, nn.Module] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` makes, in this rehearsal or an earlier one; not counted."""
        if key not in self.works:
            with self.tally.aside():
                self.works[key] = make()
        found: T = self.works[key]
        return found

    def asked(
        self, part: str, key: Hashable, rows: int, compute: Callable[[], Any], times: float = 1.0, beside: int = 0
    ) -> Any:
        """The shapes of what `compute` answers, on the meta device; counted as an evaluation of `part`.

        Args:
            beside: bytes that are alive beside what is counted.
        """
        live = self.tally.live + beside

        def found() -> tuple[Any, Work]:
            peak = self.tally.peak
            answer, work = counted(compute, self.tally, device=self.device)
            self.tally.peak = peak  # its own memory is not what is alive around it
            return _shapes(answer), work

        if (part, self.device, key) not in self.works:
            self.works[part, self.device, key] = found()
        shapes, work = self.works[part, self.device, key]
        self.calls.append(Call(part, work, rows, live, times))
        return shapes


class Understudy:
    """Stands in for a model (`engine/bundle.py`) in the code that draws.

    Args:
        request: as it was asked, with its adapters.
        prefix: of the names of its parts.
    """

    def __init__(self, model: "Model", request: Request, stage: Stage, prefix: str = "") -> None:
        self._model, self._request, self._stage, self._prefix = model, request, stage, prefix
        self._successors: dict[str, Understudy] = {}
        towers = tuple(replace(tower, encode=partial(self._encode, tower)) for tower in model.parts.towers)
        self.parts = replace(model.parts, towers=towers)
        self.source, self.device, self.dtype = model.source, torch.device("cpu"), model.dtype
        self.opened: Opened = _Opened(model.opened, stage)
        self.forms: dict[str, tuple[object, nn.Module]] = {}
        self.measures = stage.measures
        self.compiler, self.offload = Compiler("off", self.device), False
        self._worn: tuple[Attachment, ...] = ()
        self._denoisers: dict[Hashable, Denoiser] = {}
        self._controls = list(self._controlling())

    def ready(self, name: str, module: T) -> T:
        """The part as it is: towers are asked through `Tower.encode`."""
        return module

    def successor(self, name: str) -> "Understudy":
        """That of the model's successor."""
        if name not in self._successors:
            bare = self._request.model_copy(update={"loras": (), "controls": (), "image_prompts": ()})
            self._successors[name] = Understudy(self._model.successor(name), bare, self._stage, "refiner ")
        return self._successors[name]

    def wear(self, attachments: tuple[Attachment, ...]) -> None:
        """Count LoRAs in the networks from now on."""
        self._worn = attachments

    def network(self, name: str, seamless: str = "none", **about: object) -> "Denoiser":
        """What stands in for the denoising network, the same as long as the same LoRAs are worn."""
        if self._worn_key not in self._denoisers:
            form = self.form(self.parts.network, self.parts.unet)
            part = self._part(self.parts.network)
            self._denoisers[self._worn_key] = Denoiser(self._stage, part, form, self._worn_key, self._controls)
        return self._denoisers[self._worn_key]

    def decode(self, latents: Tensor, request: Request) -> Tensor:
        """Pixels of the right shape."""
        vae, tile = self._vae(), self._tile(request)
        key, z = (latents.shape, tile), to_meta(latents)
        compute = partial(latent_space.decode, vae, z, self.dtype, tile)
        found: Shape = self._stage.asked(self._part("vae decoder"), key, len(latents), compute)
        return found.ones()

    def encode(self, pixels: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        """Latents of the right shape."""
        vae, tile = self._vae(), self._tile(request)
        key, pictures = (pixels.shape, tile), to_meta(pixels)
        compute = partial(latent_space.encode, vae, pictures, self.dtype, tile)
        mean, deviation = self._stage.asked(self._part("vae encoder"), key, len(pixels), compute)
        return mean.ones(), deviation.ones()

    def upscaler(self, name: str) -> Upscaler:
        """One whose network only counts."""
        with self._stage.tally.aside():
            upscaler = open_upscaler(name, "cpu")
        if not isinstance(upscaler.network, nn.Module):
            return upscaler
        self._stage.networks["upscaler"] = upscaler.network
        return replace(upscaler, network=Stand(self._stage, "upscaler", upscaler.network))

    def form(self, part: str, module: nn.Module) -> nn.Module:
        """The twin of a network, with the LoRAs that are worn."""
        plain = self._stage.once((self.source, part, self.dtype), lambda: twin(module, self.dtype))
        if not self._worn:
            return plain
        form, added = self._stage.once((self.source, part, self._worn_key), partial(self._formed, part, plain))
        if added and self._part(part) not in self._stage.loras:
            self._stage.loras[self._part(part)] = added
        return form

    def _formed(self, part: str, plain: nn.Module) -> tuple[nn.Module, int]:
        """The form with LoRAs, and the bytes of the weights that it has for itself."""
        changes = {path: [(delta.mapped(to_meta), strength) for delta, strength in several]
                   for path, several in changes_of(part, self._worn).items()}  # fmt: skip
        way: Way = "branch" if any(a.way == "branch" or a.start > 0 or a.end < 1 for a in self._worn) else "auto"
        steps = (self._request.steps or 0) * -(-self._request.count // self._request.batch_size)
        with torch.no_grad():
            form = changed(plain, changes, way, evaluations=steps)
        shared = {id(p) for p in plain.parameters()}
        own = sum(p.nbytes for p in form.parameters() if id(p) not in shared)
        beside = sum(t.nbytes for several in changes.values() for delta, _ in several for t in delta.tensors().values())
        return form, own or beside

    @property
    def _worn_key(self) -> Hashable:
        return tuple((one.adapter.name, one.adapter.digest, one.way, one.unet, one.text) for one in self._worn)

    def _part(self, name: str) -> str:
        """A part of this model, or of the one that takes over."""
        return f"{self._prefix}{name}"

    def _vae(self) -> Any:
        return self._stage.once((self.source, "vae", self.dtype), lambda: twin(self.parts.vae, self.dtype))

    def _tile(self, request: Request) -> int:
        """Latents of a tile; 0 for one piece."""
        pixels = self._stage.measures.tile if request.vae_tile is None else request.vae_tile
        if request.seamless != "none" or not pixels:
            return 0
        return max(pixels // self.parts.vae.config.factor, 1)

    def _encode(self, tower: Tower, module: nn.Module, tokens: Tokens, skip: int) -> Encoding:
        form = self.form(tower.name, tower.module)
        seen = replace(tokens, ids=to_meta(tokens.ids), vectors=to_meta(tokens.vectors), mask=to_meta(tokens.mask))
        replaced = tuple(len(vectors) for _, _, vectors in tokens.vectors)
        key = (tokens.ids.shape, skip, replaced, tokens.mask is None, self._worn_key)
        compute = partial(tower.encode, form, seen, skip)
        found = self._stage.asked(self._part(tower.name), key, len(tokens.ids), compute)
        return Encoding(found.hidden.ones(), None if found.pooled is None else found.pooled.ones())

    def _controlling(self) -> "Iterator[Beside]":
        if not self._request.controls and not self._request.image_prompts:
            return
        from reverie.engine.steering import opened_networks  # many modules, for requests that want them

        for name, control, network in opened_networks(self._model, self._request):
            self._stage.networks[name] = network
            if control is not None:
                share = max(control.end - control.start, 0.0)
                yield Beside(name, self._stage.once((name, self.dtype), partial(twin, network, self.dtype)), share)


class _Opened(Opened):
    """Files opened for a model; of tiny decoders the network only counts."""

    def __init__(self, opened: Opened, stage: Stage) -> None:
        super().__init__()
        self._opened, self._stage = opened, stage

    def get(self, kind: str, path: Path, open_: Callable[[Path], T]) -> T:
        """See `Opened`."""
        found = self._opened.get(kind, path, open_)
        if not isinstance(found, TinyPreview):
            return found
        counting = copy.copy(found)
        self._stage.networks["tiny decoder"] = found.decoder
        counting.decoder = Stand(self._stage, "tiny decoder", found.decoder)  # type: ignore[assignment]
        return counting


class Stand:
    """Stands in for a network that is given tensors and answers with one."""

    def __init__(self, stage: Stage, part: str, network: nn.Module) -> None:
        self._stage, self._part = stage, part
        dtype = next(network.parameters()).dtype
        self._twin = stage.once((part, dtype), lambda: twin(network, dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """A tensor of the right shape."""
        key, seen = (id(self._twin), x.shape), to_meta(x)
        found: Shape = self._stage.asked(self._part, key, len(x), lambda: self._twin(seen))
        return found.ones()


@dataclass(frozen=True, eq=False)
class Beside:
    """A network that is asked beside the denoising one: a ControlNet's twin.

    Attributes:
        share: of the evaluations.
    """

    name: str
    network: nn.Module
    share: float


class Denoiser:
    """Stands in for a denoising network, and for the ControlNets that are asked beside it.

    What a network would keep for later evaluations is held by it as long as whoever keeps it: keys and values of the
    prompt (`Taps.prompt`).
    """

    def __init__(self, stage: Stage, part: str, network: nn.Module, worn: Hashable, controls: Sequence[Beside]) -> None:
        self._stage, self._part, self._network, self._worn = stage, part, network, worn
        self._controls = controls
        self._hints: dict[Hashable, Any] = {}
        self._prompts: WeakKeyDictionary[Any, dict[int, Tensor]] = WeakKeyDictionary()
        self._beyond: Tensor | None = None

    def __call__(
        self, x: Tensor, timesteps: Tensor, context: Tensor, *, taps: Taps | None = None, **named: Tensor
    ) -> Tensor:
        """A tensor of the right shape; see `UNet.forward`."""
        given = to_meta((x, timesteps, context))
        vector = {name: to_meta(t) for name, t in named.items()}
        added = 0
        for control in self._controls:
            added += self._ask(control, given, vector.get("vector"))
        key = (self._worn, x.shape, x.dtype, context.shape, tuple((n, t.shape) for n, t in vector.items()))
        seen, about = self._seen(taps, context)
        compute = partial(self._network, *given, **vector, **({} if seen is None else {"taps": seen}))
        found: Shape = self._stage.asked(self._part, (*key, *about), len(x), compute, beside=added)
        del seen, compute  # and the keys and values that they hold
        if taps is not None and taps.prompt is not None:
            self._keep(taps.prompt, context, self._stage.calls[-1].work.kept - found.ones().nbytes)
        return found.ones()

    def _keep(self, memory: Any, context: Tensor, size: int) -> None:
        """Hold as much as the prompt's keys and values take, as long as their memory is there."""
        held = self._prompts.setdefault(memory, {})
        if id(context) not in held:
            held[id(context)] = torch.empty(max(size, 0), dtype=torch.uint8, device="meta")

    def _seen(self, taps: Taps | None, context: Tensor) -> tuple[Taps | None, tuple[Hashable, ...]]:
        """What the twin is tapped by, and what about it makes a difference to the work."""
        if taps is None:
            return None, ()
        added = {path: to_meta(t) for path, t in taps.added.items()}
        whole = [self._asks(place, tap) for place, tap in taps.beyond.items()]
        beyond: dict[str, BeyondTap] = {place: self._deep(whole[0]) for place in taps.beyond}
        known = taps.prompt is not None and id(context) in self._prompts.get(taps.prompt, {})
        prompt = None if taps.prompt is None else (_known if known else _Fresh())
        about = (
            frozenset(taps.attention), taps.bypass, frozenset(taps.skips), taps.copies, tuple(whole),
            frozenset(taps.merging), frozenset(taps.features), tuple((p, t.shape) for p, t in added.items()),
            None if taps.prompt is None else known,
        )  # fmt: skip
        return replace(taps, added=added, beyond=beyond, prompt=prompt), about

    def _asks(self, place: str, tap: BeyondTap) -> bool:
        """Whether a tap wants what is beyond its place to be computed: it is asked with small tensors."""
        asked: list[bool] = []

        def usual() -> Tensor:
            asked.append(True)
            return torch.ones(8, 1, 1)

        tap(torch.zeros(8, 1, 1), torch.ones(8, 1, 1), usual)
        return bool(asked)

    def _deep(self, whole: bool) -> BeyondTap:
        def tap(before: Tensor, seen: Tensor, usual: Callable[[], Tensor]) -> Tensor:
            if whole or self._beyond is None:
                found = usual()
                self._beyond = torch.empty(1, device="meta", dtype=found.dtype).expand(found.shape)
                return found
            return self._beyond

        return tap

    def _ask(self, control: Beside, given: tuple[Tensor, ...], vector: Tensor | None) -> int:
        """Ask a ControlNet, too; how many bytes it answers."""
        x, timesteps, context = given
        network: Any = control.network
        latents = x[:, : network.config.in_channels]
        place = (control.name, latents.shape[-2:])
        if place not in self._hints:
            self._hints[place] = self._hint(control, latents)
        told = vector if not isinstance(network, ControlNet) or network.config.vector else None
        compute = partial(network, latents, timesteps, context, self._hints[place], vector=told)
        self._stage.asked(control.name, (x.shape, context.shape), len(x), compute, control.share)
        return self._stage.calls[-1].work.kept

    def _hint(self, control: Beside, latents: Tensor) -> Any:
        """What a ControlNet makes of its picture, counted once."""
        network: Any = control.network
        size = latents.shape[-2:]
        if isinstance(network, ControlNet):
            height, width = (side * network.control.factor for side in size)
            picture = latents.new_empty(1, network.control.channels, height, width)
            compute: Callable[[], Any] = partial(network.hint, [picture], [0])
        else:
            compute = partial(network.hint, latents.new_empty(1, network.config.channels, *size))
        self._stage.asked(f"{control.name} (picture)", size, 1, compute)
        return compute()


class _Fresh:
    """Keys and values of the prompt, computed and kept."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def __call__(self, module: nn.Module, context: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(module, Attention)
        pair = module.keys_values(context)
        self._kept += pair
        return pair


def _known(module: nn.Module, context: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values that are there: tensors without memory."""
    assert isinstance(module, Attention)
    width = module.to_k.out_features
    shape = (len(context), module.heads, context.shape[1], width // module.heads)
    one = torch.empty(1, dtype=context.dtype, device="meta").expand(shape)
    return one, one


def _shapes(answer: Any) -> Any:
    if isinstance(answer, Tensor):
        return Shape(tuple(answer.shape), answer.dtype)
    if isinstance(answer, Encoding):
        return Encoding(_shapes(answer.hidden), _shapes(answer.pooled))
    return tuple(map(_shapes, answer)) if isinstance(answer, tuple) else None
