"""LoRAs made of differences: extracted from two models, and cut to another rank. Singular value decompositions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from reverie.adapters.deltas import Delta, LoRA
from reverie.adapters.lora import Adapter
from reverie.adapters.lora_names import networks
from reverie.checkpoint.packed import unpacked
from reverie.errors import RequestError
from reverie.families.base import Parts

LEAST = (
    1e-6  # of a difference, beside the weight's norm, below which a layer counts as unchanged: float16 rounds at 5e-4
)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Target:
    """How much of a difference a LoRA is to hold.

    Attributes:
        rank: the largest rank.
        quality: the share of the squared difference that is to be held, by the fewest ranks that do; None for `rank`.

    Raises:
        RequestError: a rank below 1, a quality that is no share.
    """

    rank: int = 64
    quality: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RequestError(f"rank is {self.rank}; the least is 1")
        if self.quality is not None and not 0 < self.quality <= 1:
            raise RequestError(f"quality is {self.quality:g}; it is a share, above 0 and at most 1")

    def of(self, values: Tensor) -> int:
        """The rank for singular values in falling order."""
        most = max(min(self.rank, int((values > 0).sum())), 1)
        if self.quality is None:
            return most
        held = values.square().cumsum(0) / values.square().sum().clamp(min=1e-30)
        return min(int((held < self.quality - 1e-7).sum()) + 1, most)


@dataclass(frozen=True)
class Reduced:
    """What became of differences.

    Attributes:
        held: the share of the squared difference that the LoRA holds, over all layers.
        ranks: the least and the largest.
    """

    deltas: Mapping[str, Mapping[str, Delta]]
    held: float
    ranks: tuple[int, int]


def extracted(
    base: Parts, tuned: Parts, target: Target, *, dtype: torch.dtype = torch.float16, progress: Progress | None = None
) -> Reduced:
    """The difference of two models of one shape as a LoRA: what is nearest to it at each layer (Eckart & Young 1936).

    Linear layers and convolutions of the denoising network and the text encoders; norms, which a LoRA cannot hold,
    are left out.

    Args:
        dtype: of the LoRA's numbers.
        progress: called as `(layers done, layers in all)`.

    Raises:
        RequestError: models of different shapes, or models that do not differ.
    """
    layers = _layers(base, tuned)
    tally = _Tally()
    found: dict[str, dict[str, Delta]] = {}
    for done, (part, path, one, other) in enumerate(layers, 1):
        before = unpacked(one).float()
        difference = unpacked(other).float() - before
        if float(difference.norm()) > LEAST * float(before.norm()):
            found.setdefault(part, {})[path] = tally.factored(difference, target, dtype)
        if progress:
            progress(done, len(layers))
    if not found:
        raise RequestError("the two models do not differ where a LoRA could tell")
    return Reduced(found, tally.held, tally.ranks)


def resized(adapter: Adapter, target: Target) -> Reduced:
    """A LoRA of another rank that is nearest to a LoRA. Through the small factors: no layer's matrix is made.

    Raises:
        RequestError: changes that are no LoRA without Tucker core, which have no rank to choose.
    """
    tally = _Tally()
    found: dict[str, dict[str, Delta]] = {}
    for part, own in adapter.deltas.items():
        for path, delta in own.items():
            if not isinstance(delta, LoRA) or delta.mid is not None or delta.bias is not None:
                raise RequestError(f"{adapter.path}: {path} has a {type(delta).__name__} that has no other ranks")
            found.setdefault(part, {})[path] = tally.refactored(delta, target)
    return Reduced(found, tally.held, tally.ranks)


class _Tally:
    """Factors differences and counts what is held."""

    def __init__(self) -> None:
        self._held, self._all, self._ranks = 0.0, 0.0, set[int]()

    @property
    def held(self) -> float:
        return self._held / self._all if self._all else 1.0

    @property
    def ranks(self) -> tuple[int, int]:
        return min(self._ranks), max(self._ranks)

    def factored(self, difference: Tensor, target: Target, dtype: torch.dtype) -> LoRA:
        """The difference of a weight `(out, in)` or `(out, in, k, k)`."""
        u, s, v = torch.linalg.svd(difference.flatten(1), full_matrices=False)
        return self._cut(u, s, v, target, difference.shape, dtype)

    def refactored(self, delta: LoRA, target: Target) -> LoRA:
        """`up @ down` by QR: the singular values are those of a matrix of rank by rank."""
        up, down = delta.up.float().flatten(1) * delta.scale, delta.down.float().flatten(1)
        (q, r), (p, t) = torch.linalg.qr(up), torch.linalg.qr(down.T)
        u, s, v = torch.linalg.svd(r @ t.T)
        shape = torch.Size((delta.up.shape[0], *delta.down.shape[1:]))
        return self._cut(q @ u, s, v @ p.T, target, shape, delta.down.dtype)

    def _cut(self, u: Tensor, s: Tensor, v: Tensor, target: Target, shape: torch.Size, dtype: torch.dtype) -> LoRA:
        rank = target.of(s)
        self._ranks.add(rank)
        self._held += float(s[:rank].square().sum())
        self._all += float(s.square().sum())
        root = s[:rank].sqrt()  # both factors of one size, so that neither leaves float16
        down = (root[:, None] * v[:rank]).reshape(rank, *shape[1:])
        up = (u[:, :rank] * root).reshape(shape[0], rank, *(1 for _ in shape[2:]))
        return LoRA(down.to(dtype).contiguous(), up.to(dtype).contiguous(), alpha=float(rank))


def _layers(base: Parts, tuned: Parts) -> list[tuple[str, str, Tensor, Tensor]]:
    """Part, path and both weights of every layer that a LoRA can change."""
    found = []
    ours, theirs = networks(base), networks(tuned)
    for part in ours.keys() & theirs.keys():
        if part == "vae":
            continue
        others = dict(theirs[part].named_modules())
        for path, module in ours[part].named_modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                continue
            other = others.get(path)
            weight = getattr(other, "weight", None)
            if not isinstance(weight, Tensor) or weight.shape != module.weight.shape:
                raise RequestError(f"{path} of {part} is {_shape(module.weight)} in one model and {_shape(weight)}")
            found.append((part, path, module.weight.detach(), weight.detach()))
    return found


def _shape(weight: Tensor | None) -> str:
    return "not there in the other" if weight is None else " x ".join(map(str, weight.shape))
