"""What a file or folder of weights is, what is wrong with it, and what fits it.

Everything is found in headers, but for NaN and infinity: for these the numbers are read, one tensor at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reverie.adapters.kinds import Described, describe_addon
from reverie.checkpoint.source import DTYPES, WeightFile, open_sharded, open_weights
from reverie.checkpoint.weightfile import shown
from reverie.engine.deferred import DeferredFile
from reverie.errors import CheckpointError
from reverie.families.detect import open_checkpoint
from reverie.families.family import Family, Opened
from reverie.families.ldm import UNET, VAES
from reverie.families.pieces import Pieces
from reverie.families.single import SHOWING, look

Progress = Callable[[int, int], None]  # bytes read, bytes in all
CHUNK = 1 << 22  # numbers that are looked at at once
MEMORY = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes a number
READ = {dtype for dtype in DTYPES.values() if dtype.is_floating_point}
AVERAGED, OTHER = "averaged copy", "other"
WEIGHTS = ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth", "*.gguf")


@dataclass(frozen=True)
class PartReport:
    """One network of a checkpoint.

    Attributes:
        types: how many numbers are of each type.
        missing, unexpected: tensors that such a network has and this has not, and the other way round.
    """

    name: str
    tensors: int
    parameters: int
    types: Mapping[str, int]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        kind: `checkpoint`, the name of something that is none, or `refused`.
        family, variant, prediction, layout: of a checkpoint, as far as they are known.
        format: of its files.
        evidence: pairs of a claim and what supports it.
        non_finite: tensors with NaN or infinity, and which of them.
        problems: what keeps it from working, one line each; of a refused file the reason.
        notes: what is good to know.
        averaged: whether it holds an averaged copy (EMA) of the denoising network.
        pruned: whether it holds nothing but what draws.
        on_disk: bytes of its files.
        memory: bytes of the weights that draw, by the precision they are in.
        code: what code in its pickles would have called, had it been executed; it never is.
        fits: which add-ons go with it, or which models it goes with.
        metadata: texts in the file.
    """

    path: str
    kind: str
    format: str = ""
    family: str = ""
    variant: str = ""
    prediction: str = ""
    layout: str = ""
    evidence: tuple[tuple[str, str], ...] = ()
    parts: tuple[PartReport, ...] = ()
    non_finite: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    averaged: bool = False
    pruned: bool = False
    on_disk: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    code: tuple[str, ...] = ()
    fits: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 where all is well, 1 where something is wrong with it, 2 where it was refused."""
        return 2 if self.kind == "refused" else int(bool(self.problems or self.non_finite))

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"exit_code": self.exit_code}


@dataclass(frozen=True)
class _Source:
    """A weight file, and the part that it is of where its folder says so."""

    file: WeightFile
    part: str = ""


def examine(path: Path, variant: str | None = None, *, progress: Progress | None = None) -> Report:
    """Look at a file or folder of weights. Never raises for what is in it.

    Args:
        variant: of a folder's weight files, for example `fp16`.
        progress: called after each tensor.
    """
    try:
        sources = _sources(path, variant)
    except CheckpointError as error:
        size = path.stat().st_size if path.is_file() else 0
        return Report(str(path), "refused", problems=(str(error),), on_disk=size)
    addon = None if path.is_dir() else describe_addon(sources[0].file)
    facts = _facts_of_addon(sources, addon) if addon else _facts_of_checkpoint(path, variant, sources)
    bad = non_finite(sources, progress)
    files = [source.file for source in sources]
    return Report(
        path=str(path),
        format=" and ".join(sorted({file.format for file in files})),
        non_finite=bad,
        on_disk=sum(file.path.stat().st_size for file in files),
        code=tuple(dict.fromkeys(call for file in files for call in file.foreign)),
        metadata={key: value for file in files for key, value in file.metadata.items()},
        **facts,
    )


def non_finite(sources: Iterable[_Source], progress: Progress | None = None) -> dict[str, str]:
    """Tensors with numbers that are none, and what they have: `NaN`, `Inf` or both."""
    wanted = [(s, name, info) for s in sources for name, info in s.file.tensors.items()]
    done, total = 0, sum(info.end - info.start for _, _, info in wanted)
    found: dict[str, str] = {}
    for source, name, info in wanted:
        if info.dtype in READ and (what := _disease(source.file.tensor(name))):
            found[f"{source.part}: {name}" if source.part else name] = what
        done += info.end - info.start
        if progress:
            progress(done, total)
    return found


def _disease(tensor: Tensor) -> str:
    chunks = [c.float() if c.itemsize == 1 else c for c in torch.split(tensor.reshape(-1), CHUNK)]
    if all(bool(torch.isfinite(chunk).all()) for chunk in chunks):
        return ""
    signs = {"NaN": torch.isnan, "Inf": torch.isinf}
    return " and ".join(name for name, test in signs.items() if any(bool(test(chunk).any()) for chunk in chunks))


# What is there


def _sources(path: Path, variant: str | None) -> list[_Source]:
    """Every weight file.

    Raises:
        CheckpointError: none there, or one is broken or hostile.
    """
    if not path.is_dir():
        return [_Source(open_weights(path))]
    if (path / "model_index.json").exists():
        folders = sorted(p for p in path.iterdir() if p.is_dir() and (p / "config.json").exists())
        found = [source for folder in folders for source in _of_folder(folder, folder.name, variant)]
    else:
        found = _of_folder(path, path.name, variant)
    if not found:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise CheckpointError(f"{path} holds no weight files; found {there}")
    return found


def _of_folder(folder: Path, part: str, variant: str | None) -> list[_Source]:
    """The weights of one part: those of the variant, safetensors before the others."""
    for pattern in WEIGHTS:
        files = sorted(folder.glob(pattern))
        if variant:
            plain = [file for file in files if f".{variant}" in file.name]
        else:
            plain = [file for file in files if ".fp16" not in file.name] or files
        if not plain:
            continue
        indexes = sorted(folder.glob(f"{pattern}.index*.json"))
        if indexes and len(plain) > 1:
            return [_Source(file, part) for file in open_sharded(indexes[0])]
        return [_Source(open_weights(file), part) for file in plain]
    return []


def _facts_of_addon(sources: list[_Source], addon: Described) -> dict[str, Any]:
    return {
        "kind": addon.kind,
        "parts": _parts(sources, lambda name: addon.kind, {}),
        "notes": addon.facts,
        "fits": addon.fits,
        "pruned": True,
        "memory": _memory(_parts(sources, lambda name: addon.kind, {})),
        "evidence": (("kind " + addon.kind, addon.why),),
    }


def _facts_of_checkpoint(path: Path, variant: str | None, sources: list[_Source]) -> dict[str, Any]:
    """Family, parts and problems; what cannot be found out stays empty and is a problem."""
    try:
        family, opened = open_checkpoint(path, variant)
    except CheckpointError as error:
        parts = _parts(sources, _part_namer(None, None), {})
        return {"kind": "unknown", "problems": (str(error),), "parts": parts, "memory": _memory(parts)}
    pieces = opened.pieces if opened.file is None else family.open_file(DeferredFile.of(opened.file), False)
    differences, problems = _differences(pieces)
    parts = _parts(sources, _part_namer(family, opened), differences)
    facts = _identity(family, opened, bool(problems))
    notes = [f"{part.tensors} tensors that no picture needs" for part in parts if part.name == OTHER]
    averaged = any(part.name == AVERAGED for part in parts)
    return {
        "kind": "checkpoint", "family": family.name, "layout": opened.layout, "parts": parts, "averaged": averaged,
        "pruned": not averaged and not notes, "memory": _memory(parts), "notes": tuple(notes), **facts,
        "problems": (*problems, *facts.get("problems", ())),
        "fits": _fits(family, opened.pieces),
    }  # fmt: skip


def _identity(family: Family, opened: Opened, broken: bool) -> dict[str, Any]:
    """Variant, prediction and evidence; without them where the networks do not go together."""
    try:
        if broken:
            plan = family.plan(opened)
            return {"variant": plan.variant, "evidence": opened.evidence + plan.evidence}
        identity = family.assemble(opened).identity
    except (CheckpointError, KeyError) as error:
        problem = () if isinstance(error, KeyError) else (str(error),)
        return {"evidence": opened.evidence, "problems": problem}
    return {"variant": identity.variant, "prediction": identity.prediction, "evidence": identity.evidence}


def _differences(pieces: Pieces) -> tuple[dict[str, tuple[tuple[str, ...], tuple[str, ...]]], list[str]]:
    """Of each network the tensors that are missing and those that are too many; and what keeps it from being built."""
    found: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    problems: list[str] = []
    for part, piece in pieces.items():
        try:
            with torch.device("meta"):
                expected = set(piece.kind.make(piece.config).state_dict())
            names = set(piece.tensors())
        except (CheckpointError, TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            problems.append(f"{piece.where}: {reason}")
            continue
        found[part] = tuple(sorted(expected - names)), tuple(sorted(names - expected))
        for what, some in zip(("missing", "unexpected"), found[part], strict=True):
            if some:
                problems.append(f"{piece.where}: {len(some)} tensors {what}, the first is {shown(some[0])}")
    return found, problems


def _fits(family: Family, pieces: Pieces) -> tuple[str, ...]:
    """What add-ons must have been made for: networks whose prompt is as wide, text encoders with as wide words."""
    if family.network not in pieces:
        return ()
    width = pieces[family.network].config.context_width
    widths = [pieces[rule.part].config.width for rule in family.texts if not rule.t5 and rule.part in pieces]
    found = [f"LoRA, ControlNet and IP-Adapter of {family.title} whose prompt is {width} wide"]
    found += [f"embeddings {' and '.join(map(str, widths))} wide"] if widths else []
    return tuple(found)


def _part_namer(family: Family | None, opened: Opened | None) -> Callable[[str], str]:
    """Which part a tensor of a single file is of, by what its name begins with."""
    network = "denoising network" if family is None else family.network
    prefixes = {"model_ema.": AVERAGED, UNET: network} | dict.fromkeys(VAES, "vae") | SHOWING
    if family is not None:
        prefixes |= {place.prefix: rule.part for rule in family.texts for place in rule.places}
    alone = opened is not None and opened.file is not None and look(opened.file.tensors).prefix == ""
    rest = network if alone else OTHER
    return lambda name: next((part for prefix, part in prefixes.items() if name.startswith(prefix)), rest)


def _parts(
    sources: list[_Source],
    part_of: Callable[[str], str],
    differences: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]],
) -> tuple[PartReport, ...]:
    tensors, types = Counter[str](), dict[str, Counter[str]]()
    for source in sources:
        for name, info in source.file.tensors.items():
            part = source.part or part_of(name)
            tensors[part] += 1
            kind = info.packing or str(info.dtype).removeprefix("torch.")
            types.setdefault(part, Counter())[kind] += info.count
    return tuple(
        PartReport(
            part, tensors[part], types[part].total(), dict(types[part].most_common()), *differences.get(part, ())
        )
        for part in types
    )


def _memory(parts: Iterable[PartReport]) -> dict[str, int]:
    count = sum(part.parameters for part in parts if part.name not in {AVERAGED, OTHER})
    return {name: count * size for name, size in MEMORY.items()}
