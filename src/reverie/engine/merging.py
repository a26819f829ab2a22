"""Models out of models: merged, with LoRAs baked in. Tensor by tensor, through `engine/convert.py`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from reverie.adapters.attach import Attachment, Change, changes_of, merged_bias, merged_weight, of_block
from reverie.engine.convert import Converted, convert
from reverie.engine.deferred import Deferred, DeferredFile, now
from reverie.engine.mixing import METHODS, Method, Options
from reverie.errors import RequestError
from reverie.families.base import Parts
from reverie.families.detect import open_checkpoint
from reverie.families.pieces import Piece, Pieces

MERGED = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")  # the VAE stays the first model's
Part = Mapping[str, Tensor]


@dataclass(frozen=True)
class Merge:
    """What is merged, and how.

    Attributes:
        others: the models that are merged into the first, each with its weight.
        base: what differences are taken from.
        method: a name of `METHODS`.
        blocks: weights of single blocks, instead of the models' own: by module (`up_blocks.1`) or by the names of block
            merging (`IN00` to `IN11`, `MID`, `OUT00` to `OUT11`, `BASE` for the text encoders and the rest).
        parts: the networks that are merged; the others are the first model's.

    Raises:
        RequestError: an unknown method, models or a base too many or too few, a density that is no share.
    """

    others: tuple[tuple[Path, float], ...]
    base: Path | None = None
    method: str = "weighted_sum"
    blocks: Mapping[str, float] = field(default_factory=dict)
    options: Options = field(default_factory=Options)
    parts: tuple[str, ...] = MERGED

    def __post_init__(self) -> None:
        name, method = METHODS.name(self.method), self.how
        if not self.others or (method.pairs and len(self.others) != 1):
            expected = "exactly one other model" if method.pairs else "at least one other model"
            raise RequestError(f"{name} merges the first model with {expected}; {len(self.others)} were given")
        if method.needs_base and self.base is None:
            raise RequestError(f"{name} takes differences from a base model; give one")
        if not method.needs_base and self.base is not None:
            raise RequestError(f"{name} has no use for a base model; leave it out")
        if not 0 < self.options.density <= 1:
            raise RequestError(f"density is {self.options.density:g}; it is a share of numbers, above 0 and at most 1")

    @property
    def how(self) -> Method:
        """The method."""
        return METHODS[self.method]

    def weights(self, path: str) -> list[float]:
        """Of the other models, for one layer."""
        own = of_block(self.blocks, path)
        return [weight if own is None else own for _, weight in self.others]


def merge(first: Path, merged: Merge, out: Path, **options: Any) -> Converted:
    """Write the merge of models, in the first one's layout or another.

    Args:
        options: as `convert` takes them.

    Raises:
        CheckpointError, OutputError: as `convert`.
        RequestError: models of different families or shapes.
    """
    others = [_pieces(path) for path, _ in merged.others]
    base = None if merged.base is None else _pieces(merged.base)
    sources = [path for path, _ in merged.others] + ([merged.base] if merged.base else [])

    def change(pieces: Pieces, _: Parts) -> Pieces:
        for path, (family, other) in zip(sources, [*others, *([base] if base else [])], strict=True):
            _check(first, pieces, path, family, other)
        return {name: _merged(piece, name, merged, others, base) for name, piece in pieces.items()}

    return convert(first, out, change=change, **options)


def bake(first: Path, attach: Callable[[Parts], Sequence[Attachment]], out: Path, **options: Any) -> Converted:
    """Write a model with LoRAs in its weights.

    Args:
        attach: opens the LoRAs for the model.
        options: as `convert` takes them.

    Raises:
        CheckpointError, OutputError, RequestError: as `convert`, or as `open_adapter`.
    """

    def change(pieces: Pieces, model: Parts) -> Pieces:
        attachments = attach(model)
        return {name: _baked(piece, name, attachments) for name, piece in pieces.items()}

    return convert(first, out, change=change, **options)


# Merging


def _pieces(path: Path) -> tuple[str, Pieces]:
    family, opened = open_checkpoint(path)
    pieces = opened.pieces if opened.file is None else family.open_file(DeferredFile.of(opened.file), False)
    return family.name, pieces


def _check(first: Path, pieces: Pieces, path: Path, family: str, other: Pieces) -> None:
    """Refuse models whose tensors do not correspond. An inpainting network takes others at its first channels."""
    for name in set(pieces) & set(other) & set(MERGED):
        ours, theirs = (asdict(piece.config) for piece in (pieces[name], other[name]))
        differing = [key for key in ours if ours[key] != theirs.get(key) and key not in {"in_channels", "eps"}]
        if differing:
            key = differing[0]
            found = f"{key} of {name} is {ours[key]} in {first} and {theirs.get(key)} in {path}"
            raise RequestError(f"{found} ({family}); only models of one family and shape merge")
    if not set(pieces) & set(other) & set(MERGED):
        raise RequestError(f"{first} and {path} have no network in common")


def _merged(
    piece: Piece,
    name: str,
    merged: Merge,
    others: Sequence[tuple[str, Pieces]],
    base: tuple[str, Pieces] | None,
) -> Piece:
    missing = name not in merged.parts or any(name not in pieces for _, pieces in others)
    if missing or (base is not None and name not in base[1]):
        return piece

    def tensors() -> Part:
        first = piece.tensors()
        each = [pieces[name].tensors() for _, pieces in others]
        ground = first if base is None else base[1][name].tensors()
        return {key: _mixed(key, merged, tensor, each, ground) for key, tensor in first.items()}

    return replace(piece, tensors=tensors)


def _mixed(key: str, merged: Merge, first: Tensor, others: Sequence[Part], base: Part) -> Tensor:
    """One tensor, when it is asked for."""
    if not first.is_floating_point() or any(key not in other for other in (*others, base)):
        return first

    def load() -> Tensor:
        mine = now(first).float()
        theirs = [_fitted(now(other[key]).float(), mine) for other in others]
        ground = _fitted(now(base[key]).float(), mine)
        weights = merged.weights(key.rpartition(".")[0])
        return merged.how.mix(mine, theirs, weights, ground, merged.options).to(first.dtype)

    return Deferred.of(first.shape, first.dtype, load)


def _fitted(other: Tensor, like: Tensor) -> Tensor:
    """Of the shape of another: an ordinary network's first convolution leaves an inpainting one's further channels."""
    if other.shape == like.shape:
        return other
    shared = min(other.shape[1], like.shape[1])
    fitted = like.clone()
    fitted[:, :shared] = other[:, :shared]
    return fitted


# Baking


def _baked(piece: Piece, part: str, attachments: Sequence[Attachment]) -> Piece:
    changes = changes_of(part, attachments)

    def tensors() -> Part:
        found = dict(piece.tensors())
        for path, several in changes.items():
            weight, bias = f"{path}.weight", f"{path}.bias"
            found[weight] = _baked_later(found[weight], several, merged_weight)
            if bias in found:
                found[bias] = _baked_later(found[bias], several, merged_bias)
        return found

    return replace(piece, tensors=tensors) if changes else piece


def _baked_later(
    tensor: Tensor, changes: Sequence[Change], bake: Callable[[Tensor, Sequence[Change]], Tensor | None]
) -> Tensor:
    def load() -> Tensor:
        made = bake(now(tensor), changes)
        assert made is not None
        return made

    return Deferred.of(tensor.shape, tensor.dtype, load)
