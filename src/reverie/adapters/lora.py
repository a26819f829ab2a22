"""LoRA files of every dialect and algorithm, opened for a model: each tensor accounted for.

What the names mean is in `lora_names`, what the numbers do in `deltas`. Here the two meet: tensors are gathered by the
layer that they change and checked against its weight. What has no place is counted and named, never skipped in silence.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from reverie.adapters import files
from reverie.adapters.deltas import Delta, LoRA, Sum, assembled
from reverie.adapters.deltas.base import AbsurdRankError, check_finite
from reverie.adapters.embedding import Embedding, bundled, placed
from reverie.adapters.hints import Hint, hint_for
from reverie.adapters.kinds import by_width, describe_addon, shown_models, told_models
from reverie.adapters.lora_names import Names, Target, names_of, parted, shapes_of
from reverie.checkpoint.source import open_weights
from reverie.checkpoint.weightfile import WeightFile, shown
from reverie.errors import CheckpointError
from reverie.families.base import Parts
from reverie.families.family import FAMILIES
from reverie.nets.unet import UNet

PEFT_METADATA = "lora_adapter_metadata"  # diffusers: the configs of peft, by part, as one JSON
PEFT_CONFIG = "adapter_config.json"  # peft: beside the file
ALONE = {"weight", "bias", "alpha"}  # endings that show nothing: every checkpoint has them
FACTORS = ("lora_down.weight", "hada_w1_b", "lokr_w2_b")  # whose rows are the rank
SHORT = 12  # digits of a hash in A1111's pictures
SHOWN = 3  # names in a message

Group: TypeAlias = dict[str, str]
"""The tensors of one layer: endings -> names in the file."""
Deltas: TypeAlias = dict[str, dict[str, Delta]]


@dataclass(frozen=True)
class Coverage:
    """What of a file has found its place.

    Attributes:
        tensors: of the file, but those of embeddings.
        matched: layers that are changed, by part.
        unmatched: names of tensors that no layer of the model has, or that say again what others said.
        unfit: modules whose tensors do not fit the layer of their name, and why.
        algorithms: how many layers each changes.
        ranks: of its factors, in order.
        made_for: the models that the file was made for, as far as it shows.
    """

    tensors: int
    matched: Mapping[str, int]
    unmatched: tuple[str, ...] = ()
    unfit: Mapping[str, str] = field(default_factory=dict)
    algorithms: Mapping[str, int] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    made_for: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether everything has."""
        return not self.unmatched and not self.unfit

    def line(self) -> str:
        """In one line."""
        kinds = " and ".join(f"{name} at {count} layers" for name, count in self.algorithms.items())
        ranks = f" of rank {_listed(self.ranks)}" if self.ranks else ""
        where = ", ".join(f"{part} {count}" for part, count in self.matched.items())
        text = f"{kinds}{ranks} ({where})"
        if self.unmatched:
            text += f"; {len(self.unmatched)} of {self.tensors} tensors unmatched ({_some(self.unmatched)})"
        if self.unfit:
            module, reason = next(iter(self.unfit.items()))
            text += f"; {len(self.unfit)} layers do not fit, first {module}: {reason}"
        return text

    def as_dict(self) -> dict[str, Any]:
        """As JSON, for the metadata of pictures."""
        return {
            "tensors": self.tensors, "matched": dict(self.matched), "unmatched": len(self.unmatched),
            "unfit": len(self.unfit), "algorithms": dict(self.algorithms), "ranks": list(self.ranks),
            "made_for": list(self.made_for),
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA-like file, opened for a model. Its tensors are views of the mapped file.

    Attributes:
        name: the file's, without its ending.
        deltas: what is changed: part -> path of the module -> change.
        embeddings: the textual inversions inside.
        hint: how it wants to be drawn with, where its name tells.
        data: the byte where its tensors begin; 0 where the file is no safetensors file.
    """

    path: Path
    name: str
    metadata: Mapping[str, str]
    deltas: Mapping[str, Mapping[str, Delta]]
    coverage: Coverage
    embeddings: tuple[Embedding, ...] = ()
    hint: Hint | None = None
    data: int = 0

    @property
    def alias(self) -> str:
        """The name that its trainer gave it; A1111 prefers it to the file's."""
        return self.metadata.get(files.ALIAS) or self.name

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return files.digest(self.path)

    @cached_property
    def short(self) -> str:
        """The hash as A1111 writes it into pictures (`Lora hashes`; Civitai's AutoV3).

        What the trainer wrote as `sshs_model_hash`, else the SHA-256 of what follows the header of a safetensors file.
        """
        own = self.metadata.get("sshs_model_hash", "")
        return (own if re.fullmatch(r"[0-9a-f]{64}", own) else files.digest(self.path, self.data))[:SHORT]

    def cut(self, rank: int) -> "Adapter":
        """The same with at most so many of its first ranks: `<lora:name:1:1:rank>` of a dynamic LoRA (LyCORIS DyLoRA).

        Changes that are no plain LoRA stay whole.
        """
        return replace(
            self, deltas={part: {p: _cut(d, rank) for p, d in own.items()} for part, own in self.deltas.items()}
        )


def open_adapter(path: Path, parts: Parts) -> Adapter:
    """Open a file, or a folder of diffusers or peft, for a model.

    Raises:
        CheckpointError: no LoRA, damaged, or made for another model; both models are named.
    """
    path = files.weight_file(path)
    file = open_weights(path)
    inside = bundled(file.tensors)
    of_words = {name for tables in inside.values() for name in tables.values()}
    groups, strangers = _grouped(name for name in file.tensors if name not in of_words)
    if not any(set(group) - ALONE for group in groups.values()):
        raise _no_lora(file)
    deltas, unmatched, unfit = _Builder(file, parts).deltas(groups)
    coverage = _coverage(deltas, file, len(file.tensors) - len(of_words), (*strangers, *unmatched), unfit)
    _check_family(file, parts, coverage)
    words = tuple(_bundled_embedding(file, parts, word, tables) for word, tables in inside.items())
    return Adapter(
        path, path.stem, file.metadata, deltas, coverage, words, hint_for(path, file.metadata),
        file.data if file.format == "safetensors" else 0,
    )  # fmt: skip


class _Builder:
    """Makes changes of groups of tensors."""

    def __init__(self, file: WeightFile, parts: Parts) -> None:
        self.file = file
        self.names: Names = names_of(parts)
        self.shapes = shapes_of(parts)
        self.scales = _peft_scales(file)

    def deltas(self, groups: Mapping[str, Group]) -> tuple[Deltas, list[str], dict[str, str]]:
        """The changes, the names of tensors without a place, and modules that do not fit with the reasons."""
        found: Deltas = {}
        unmatched: list[str] = []
        unfit: dict[str, str] = {}
        for module, group in groups.items():
            target = self.names.find(module)
            if target is None or any(path in found.get(target.part, {}) for path in target.paths):
                unmatched += group.values()
                continue
            try:
                found.setdefault(target.part, {}).update(self._built(group, target))
            except AbsurdRankError as error:
                raise CheckpointError(f"{self.file.path}: {module}.{error}") from None
            except CheckpointError as error:
                self._refuse_damaged(module, group)
                unfit[module] = str(error)
        return {part: own for part, own in found.items() if own}, unmatched, unfit

    def _built(self, group: Group, target: Target) -> dict[str, Delta]:
        """The change of one layer, or of the three that a file has in one."""
        tensors = {ending: self.file.tensor(name) for ending, name in group.items() if ending != "alpha"}
        shapes = [self.shapes[target.part, path] for path in target.paths]
        rows = [shape[0] for shape in shapes]
        shape = (sum(rows), *shapes[0][1:])
        delta = assembled(tensors, self._alpha(group, target, tensors), shape)
        if target.swapped:
            return {target.paths[0]: delta.rows(torch.arange(rows[0]).roll(rows[0] // 2))}
        if len(rows) == 1:
            return {target.paths[0]: delta}
        ends = [sum(rows[: i + 1]) for i in range(len(rows))]
        pairs = zip(target.paths, ends, rows, strict=True)
        return {path: delta.rows(slice(end - count, end)) for path, end, count in pairs}

    def _refuse_damaged(self, module: str, group: Group) -> None:
        """Numbers that are none damage the file as a whole, not one layer of it."""
        try:
            check_finite({ending: self.file.tensor(name) for ending, name in group.items()})
        except CheckpointError as error:
            raise CheckpointError(f"{self.file.path}: {module}.{error}") from None

    def _alpha(self, group: Group, target: Target, tensors: Mapping[str, Tensor]) -> float | None:
        if "alpha" in group:
            alpha = self.file.tensor(group["alpha"])
            if alpha.numel() != 1:
                raise CheckpointError(f"alpha has shape {list(alpha.shape)}; expected one number")
            return float(alpha)
        scale = self.scales.get(target.part) or self.scales.get("", _PeftScale())
        return scale.at(target.paths[0], tensors)


@dataclass(frozen=True)
class _PeftScale:
    """What a config of peft says of scales.

    Attributes:
        alpha: of every layer but those of `own`; None where nothing is said.
        own: by the last words of a layer's path.
        root: the scale is alpha by the root of the rank (rsLoRA, Kalajdzievski 2023), not by the rank.
    """

    alpha: float | None = None
    own: Mapping[str, float] = field(default_factory=dict)
    root: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "_PeftScale":
        """Of `LoraConfig` as JSON.

        Raises:
            ValueError: an alpha that is no number, or for layers that a regular expression names.
        """
        alpha, own = config.get("lora_alpha", config.get("alpha")), dict(config.get("alpha_pattern") or {})
        for key, value in {"": alpha, **own}.items():
            if not re.fullmatch(r"[\w.-]*", key) or not isinstance(value, int | float | None):
                raise ValueError(
                    f"alpha of {shown(key)} is {shown(str(value))}; expected the name of a layer, a number"
                )
        return cls(alpha, own, bool(config.get("use_rslora")))

    def at(self, path: str, tensors: Mapping[str, Tensor]) -> float | None:
        """The alpha of a layer: its scale times its rank."""
        alpha = next((a for key, a in self.own.items() if f".{path}".endswith(f".{key}")), self.alpha)
        down = next((tensors[name] for name in FACTORS if name in tensors), None)
        return alpha if alpha is None or down is None or not self.root else alpha * math.sqrt(len(down))


def _peft_scales(file: WeightFile) -> dict[str, _PeftScale]:
    """By part, in the metadata of a file of diffusers; beside one of peft, for all parts under an empty name.

    Raises:
        CheckpointError: the config is broken.
    """
    beside = file.path.with_name(PEFT_CONFIG)
    try:
        if PEFT_METADATA in file.metadata:
            flat = json.loads(file.metadata[PEFT_METADATA])
            return {part: _PeftScale.of(config) for part, config in _by_part(flat).items()}
        if file.path.stem == files.INSIDE[1] and beside.is_file():
            return {"": _PeftScale.of(json.loads(beside.read_text(encoding="utf-8")))}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the LoRA config of {file.path} is broken: {str(error)[:120]}") from None
    return {}


def _by_part(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`unet.lora_alpha` -> `unet`, `lora_alpha`."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        part, _, key = name.partition(".")
        found.setdefault(part, {})[key] = value
    return found


def _grouped(names: Iterable[str]) -> tuple[dict[str, Group], list[str]]:
    """Tensors by the module that they change, and the names of those that change none."""
    groups: dict[str, Group] = {}
    strangers = []
    for name in names:
        known = parted(name)
        if known is None or known[1] in groups.get(known[0], {}):
            strangers.append(name)
        else:
            groups.setdefault(known[0], {})[known[1]] = name
    return groups, strangers


def _coverage(
    deltas: Deltas, file: WeightFile, tensors: int, unmatched: tuple[str, ...], unfit: Mapping[str, str]
) -> Coverage:
    every = [delta for own in deltas.values() for delta in own.values()]
    ranks = sorted({rank for delta in every if (rank := delta.rank) is not None})
    kinds = Counter(_kind(delta) for delta in every)
    matched = {part: len(own) for part, own in deltas.items()}
    made = shown_models(file) or told_models(file)
    return Coverage(tensors, matched, unmatched, unfit, dict(kinds.most_common()), tuple(ranks), made)


def _kind(delta: Delta) -> str:
    if isinstance(delta, Sum):
        return " + ".join(_kind(part) for part in delta.parts)
    return type(delta).__name__


def _check_family(file: WeightFile, parts: Parts, coverage: Coverage) -> None:
    """Refuse a file of another family: its names or the prompt that it reads show it, or nothing fits."""
    title = FAMILIES[parts.identity.family].title
    width = parts.unet.config.context_width
    own = by_width(width) if isinstance(parts.unet, UNet) else title
    models = shown_models(file)
    if coverage.matched and (not models or any(model.startswith(own) for model in models)):
        return
    made = " or ".join(coverage.made_for)
    text = f"{file.path} is a LoRA for {made or 'a model that its names do not tell'}; this model is {title}"
    text += f", whose prompt is {width} wide" if own != title else ""
    if not coverage.matched:
        text += f": none of the {coverage.tensors} tensors has a place in it"
        module, reason = next(iter(coverage.unfit.items()), ("", ""))
        text += f"; {module}: {reason}" if module else f" ({_some(coverage.unmatched)})"
    raise CheckpointError(text)


def _no_lora(file: WeightFile) -> CheckpointError:
    """The error for what is something else, named where it is known."""
    found = describe_addon(file)
    if found is None:
        return CheckpointError(
            f"{file.path} is no LoRA; its {len(file.tensors)} tensors are {_some(list(file.tensors))}"
        )
    fits = f" for {' or '.join(found.fits)}" if found.fits else ""
    return CheckpointError(f"{file.path} is no LoRA but: {found.kind}{fits} ({found.why})")


def _bundled_embedding(file: WeightFile, parts: Parts, word: str, tables: Group) -> Embedding:
    vectors = placed({table: file.tensor(name) for table, name in tables.items()}, parts, file.path)
    return Embedding(word, vectors, file.path, "")


def _cut(delta: Delta, rank: int) -> Delta:
    if not isinstance(delta, LoRA) or rank >= delta.rank or rank < 1 or delta.mid is not None:
        return delta
    down, up = delta.down[:rank], delta.up[:, :rank]
    return replace(delta, down=down, up=up, alpha=delta.scale * rank)


def _some(names: Iterable[str]) -> str:
    first = list(names)
    return ", ".join(map(shown, first[:SHOWN])) + (", ..." if first[SHOWN:] else "")


def _listed(numbers: Iterable[int]) -> str:
    return " and ".join(map(str, numbers))
