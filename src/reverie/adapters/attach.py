"""Networks with adapters in them: forms that share every untouched weight with the network they are made of.

The network itself never changes. A form is a copy of the modules on the way to the layers that an adapter changes;
these have new weights (merged), or say beside their own output what the adapter adds (branched). To detach is to
drop the form.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from reverie.adapters.deltas import Delta
from reverie.adapters.deltas.base import bias_of, summed
from reverie.checkpoint.packed import PackedTensor, is_halved
from reverie.errors import RequestError
from reverie.nets.forms import shared, with_layers
from reverie.sampling.guidance import during

if TYPE_CHECKING:
    from reverie.adapters.lora import Adapter

Way: TypeAlias = Literal["auto", "merge", "branch"]
Change: TypeAlias = tuple[Delta, float]
"""What is done to a layer, and how strongly."""

M = TypeVar("M", bound=nn.Module)
FEW = 4  # a merge costs what side branches cost in 3 evaluations at 256 pixels, fewer at 512: bench/adapters.py
NAMED_BLOCK = re.compile(r"BASE|MID|M00|IN(0\d|1[01])|OUT(0\d|1[01])")


@dataclass(frozen=True, eq=False)
class Attachment:
    """An adapter and how strongly it acts.

    Attributes:
        unet: strength in the denoising network, of U-Net or transformer alike; negative for the opposite.
        text: strength in the text encoders.
        blocks: factors of the strength, by the path of a module (`up_blocks.1`, `transformer_blocks.7`; the longest
            that fits counts) or by the names of LoRA Block Weight (`BASE` the text encoders and what is in no block,
            `IN00` to `IN11`, `MID`, `OUT00` to `OUT11`); 1 elsewhere.
        start, end: between which fractions of the steps it acts.
        way: `merge` into the weights, `branch` beside them, or `auto` for what takes less time.

    Raises:
        RequestError: a strength that is no number, or an interval that ends before it begins.
    """

    adapter: "Adapter"
    unet: float = 1.0
    text: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)
    start: float = 0.0
    end: float = 1.0
    way: Way = "auto"

    def __post_init__(self) -> None:
        for name, value in {"strength": self.unet, "text strength": self.text, **self.blocks}.items():
            if not math.isfinite(value):
                raise RequestError(f"{self.adapter.name}: {name} is {value}; give a number")
        if not 0 <= self.start < self.end <= 1:
            found = f"acts from {self.start} to {self.end}"
            raise RequestError(f"{self.adapter.name} {found}; start and end are fractions of the steps, start first")

    def strength(self, part: str, path: str) -> float:
        """At one layer.

        Args:
            part: name of the network's folder: `unet`, `transformer`, `text_encoder`, ...; 0 in the `vae`.
            path: of the layer in the network.
        """
        if part == "vae":
            return 0.0
        if part.startswith("text_encoder"):
            return self.text * self.blocks.get("BASE", 1.0)
        factor = of_block(self.blocks, path)
        return self.unet * (1.0 if factor is None else factor)

    def acts(self, progress: float) -> bool:
        """Whether it acts at a step.

        Args:
            progress: share of the steps that came before (`sampling.guidance.Clock.progress`).
        """
        return during(progress, self.start, self.end)

    def order(self) -> tuple[object, ...]:
        """A place in an order that does not depend on who was attached first."""
        blocks = tuple(sorted(self.blocks.items()))
        return (self.adapter.digest, self.adapter.name, self.unet, self.text, blocks)


def formed(
    network: M, part: str, attachments: Sequence[Attachment], way: Way = "auto", *, evaluations: int | None = None
) -> M:
    """The form of a network with adapters in it; the network itself where none has anything for it.

    The same bits come out in whatever order the adapters were attached.

    Args:
        network: ready to compute: on its device, in its precision; seamless already where it is to be.
        part: name of its folder.
        attachments: those that act (`acting`), at most one form for each set of them.
        way: of all layers; where `auto`, the attachments' own wishes count.
        evaluations: how often the form will be used, if known.

    Raises:
        RequestError: factors for a block that the network does not have.
    """
    for attachment in attachments:
        _check_blocks(network, part, attachment)
    changes = changes_of(part, attachments)
    wishes: set[Way] = {attachment.way for attachment in attachments} if way == "auto" else {way}
    chosen: Way = "branch" if "branch" in wishes else "merge" if "merge" in wishes else "auto"
    return changed(network, changes, chosen, evaluations=evaluations)


def changes_of(part: str, attachments: Iterable[Attachment]) -> dict[str, list[Change]]:
    """What adapters do to the layers of a network, by their paths: in one order, whatever that of the attachments."""
    changes: dict[str, list[Change]] = {}
    for attachment in sorted(attachments, key=Attachment.order):
        for path, delta in attachment.adapter.deltas.get(part, {}).items():
            if strength := attachment.strength(part, path):
                changes.setdefault(path, []).append((delta, strength))
    return changes


def acting(attachments: Iterable[Attachment], progress: float) -> tuple[Attachment, ...]:
    """Those that act at a step; see `Attachment.acts`."""
    return tuple(attachment for attachment in attachments if attachment.acts(progress))


def changed(
    network: M, changes: Mapping[str, Sequence[Change]], way: Way = "auto", *, evaluations: int | None = None
) -> M:
    """The form of a network with changes at some of its layers; the network itself where there are none.

    Training uses it with changes whose tensors are parameters (`Delta.mapped(nn.Parameter)`): these become branches,
    and gradients reach them.

    Args:
        changes: by path of the layer; differences are added up in the order given.

    Raises:
        ValueError: a change of something else than a linear layer or convolution is to be trained.
    """
    layers: dict[str, nn.Module] = {}
    for path, several in changes.items():
        layer = network.get_submodule(path)
        choose = _branched if _branches(layer, several, way, evaluations) else _merged
        layers[path] = choose(layer, several)
    return with_layers(network, layers)


def of_block(numbers: Mapping[str, float], path: str) -> float | None:
    """The number for a layer of a U-Net: by the longest path of a module that leads to it, else by `block_name`."""
    fitting = [key for key in numbers if path == key or path.startswith(f"{key}.")]
    return numbers[max(fitting, key=len)] if fitting else numbers.get(block_name(path))


def block_name(path: str) -> str:
    """The name that LoRA Block Weight has for the place of a layer of a U-Net; `BASE` for what is in no block.

    The names are those of the original layout: `IN04` is `input_blocks.4` (two residual blocks a level).
    """
    if path == "conv_in":
        return "IN00"
    if path.startswith("mid_block."):
        return "MID"
    found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)", path)
    if not found:
        return "BASE"
    side, level, kind, index = found[1], int(found[2]), found[3], int(found[4])
    within = 2 if kind.endswith("samplers") else index
    return f"IN{1 + 3 * level + within:02}" if side == "down" else f"OUT{3 * level + within:02}"


def _check_blocks(network: nn.Module, part: str, attachment: Attachment) -> None:
    """Refuse factors that would be passed over in silence."""
    if part == "vae" or part.startswith("text_encoder"):
        return
    for key in attachment.blocks:
        try:
            known = bool(NAMED_BLOCK.fullmatch(key)) or network.get_submodule(key) is not network
        except AttributeError:
            known = False
        if not known:
            example = ", ".join([name for name, _ in network.named_children()][:6])
            raise RequestError(
                f"{attachment.adapter.name}: this model has no block {key!r}; name a module ({example}, ...), "
                "IN00 to IN11, MID, OUT00 to OUT11, or BASE"
            )


def _branches(layer: nn.Module, changes: Sequence[Change], way: Way, evaluations: int | None) -> bool:
    """Whether the changes of a layer go beside it instead of into it."""
    trained = any(t.requires_grad for delta, _ in changes for t in delta.tensors().values())
    if not isinstance(layer, nn.Linear | nn.Conv2d):  # norms and embeddings are small
        if trained:
            raise ValueError(
                f"changes of {type(layer).__name__} cannot be trained, only linear layers and convolutions"
            )
        return False
    packed = isinstance(layer.weight, PackedTensor) and not is_halved(layer.weight)
    if trained or packed or way != "auto":
        return trained or packed or way == "branch"
    return evaluations is not None and evaluations < FEW and all(delta.cheap for delta, _ in changes)


class Branched(nn.Module):
    """What a layer becomes that says beside its output what adapters add. Mixed into the layer's own class."""

    changes: tuple[Change, ...]

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, and more."""
        y: Tensor = super().forward(x)
        for delta, strength in self.changes:
            y = y + delta.branch(self, x, strength)
        return y


@cache
def _with_branches(kind: Any) -> type[nn.Module]:
    """The class of layers of a kind that have branches."""
    return type(f"Branched{kind.__name__}", (Branched, kind), {})


def _branched(layer: nn.Module, changes: Sequence[Change]) -> nn.Module:
    """The layer, sharing its weights, with branches beside it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    copy = shared(layer)
    kind: Any = type(layer)  # mypy takes a class of modules for one that has no hash
    copy.__class__ = _with_branches(kind)
    copy.changes = tuple((_ready(delta, weight), strength) for delta, strength in changes)  # type: ignore[assignment]
    return copy


def _ready(delta: Delta, weight: Tensor) -> Delta:
    """Where the layer computes, and in its precision where the change is computed in that; training's as they are."""

    def ready(t: Tensor) -> Tensor:
        if t.requires_grad or not t.is_floating_point():
            return t
        return t.to(weight.device, weight.dtype if delta.cheap else t.dtype)

    return delta.mapped(ready)


@torch.no_grad()
def _merged(layer: nn.Module, changes: Sequence[Change]) -> nn.Module:
    """The layer with other weights, computed in float32 and rounded once."""
    weight, bias, copy = layer.weight, bias_of(layer), shared(layer)
    assert isinstance(weight, Tensor)
    copy.register_parameter("weight", nn.Parameter(merged_weight(weight, changes), requires_grad=False))
    other = merged_bias(bias, changes)
    if other is not None and other is not bias:
        copy.register_parameter("bias", nn.Parameter(other.to(weight.device, weight.dtype), requires_grad=False))
    return copy


def merged_weight(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """A weight with changes in it."""
    original = weight.float()
    total = original
    for delta, strength in changes:
        total = delta.added(total, original, strength)
    return total.to(weight.dtype)


def merged_bias(bias: Tensor | None, changes: Sequence[Change]) -> Tensor | None:
    """A layer's bias with changes in it; the same where they have nothing for it."""
    more = summed([delta.bias_difference(bias, strength) for delta, strength in changes])
    if more is None or bias is None:
        return bias if more is None else more
    return (bias.float() + more.to(bias.device)).to(bias.dtype)
