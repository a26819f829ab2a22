"""From one layout of a model to another, in another precision: diffusers folder, single file, both ways.

Names and shapes come from the tables of the families, numbers tensor by tensor (`engine/deferred.py`), so that memory
is needed for one tensor at a time. What was written is opened again before it gets its name: a model that the other
layout cannot hold is refused, not changed.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reverie.checkpoint.packed import plain, unpacked
from reverie.checkpoint.save import Entry, Progress, write_entries, write_json
from reverie.checkpoint.source import WeightFile, open_weights
from reverie.checkpoint.stream import SHARD, entries_of, write_sharded
from reverie.engine.deferred import DeferredFile, now
from reverie.engine.hashes import hash_paths
from reverie.errors import CheckpointError, OutputError, RequestError
from reverie.families.assembly import Plan
from reverie.families.base import Parts
from reverie.families.detect import open_checkpoint
from reverie.families.family import Family, Opened
from reverie.families.pieces import Piece, Pieces
from reverie.families.scheduler import read_scheduler
from reverie.families.single import ignored, look
from reverie.nets.t5 import T5Encoder
from reverie.text.t5_tokenizer import T5Tokenizer
from reverie.text.tokenizer import ClipTokenizer

Change = Callable[[Pieces, Parts], Pieces]
"""`(networks to be written, the model) -> networks of the same shapes`."""
Layout = Literal["diffusers", "single"]
Precision = Literal["float32", "float16", "bfloat16", "fp8"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "fp8": torch.float16}
FP8, LARGEST = torch.float8_e4m3fn, 448.0  # OCP 8-bit Floating Point Specification, table 2
MARKS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.")  # tensors that say what a network predicts
# Metadata that is no longer true, or was about the container.
DROPPED = ("format", "wrapper", "left_out", "modelspec.hash_sha256", "sshs_", "comfy.gguf.", "general.")
HELD = ("base_positions",)  # of configs: what only begins a training; the positions made of it are in the file
PROBE = "A photo of an astronaut, (riding) a horse: 4k — déjà vu 馬"
# The pipeline of diffusers that opens a folder, by family and variant.
PIPELINES: dict[str, dict[str, str]] = {
    "sd1": {
        "": "StableDiffusionPipeline", "inpaint": "StableDiffusionInpaintPipeline",
        "pix2pix": "StableDiffusionInstructPix2PixPipeline",
    },
    "sd2": {
        "": "StableDiffusionPipeline", "inpaint": "StableDiffusionInpaintPipeline",
        "pix2pix": "StableDiffusionInstructPix2PixPipeline",
    },
    "sdxl": {
        "": "StableDiffusionXLPipeline", "inpaint": "StableDiffusionXLInpaintPipeline",
        "pix2pix": "StableDiffusionXLInstructPix2PixPipeline", "refiner": "StableDiffusionXLImg2ImgPipeline",
    },
    "sd3": {"": "StableDiffusion3Pipeline"},
}  # fmt: skip
OPTIONAL = {"sd1": ("safety_checker", "feature_extractor"), "sd2": ("safety_checker", "feature_extractor")}


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        family: empty for a file that is no checkpoint.
        tensors, bytes: how many, and of what size.
        source_sha256: of what it was made from, also in its metadata.
        notes: what the new layout does not hold.
    """

    path: Path
    family: str
    layout: Layout
    tensors: int
    bytes: int
    source_sha256: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Job:
    """Everything that is to be written.

    Attributes:
        model: as it is opened, to compare with what was written; None where a part of it is converted alone.
    """

    family: Family
    opened: Opened
    pieces: Pieces
    plan: Plan
    model: Parts | None
    dtype: Precision | None
    metadata: Mapping[str, str]


def convert(
    source: Path,
    out: Path,
    *,
    layout: Layout | None = None,
    dtype: Precision | None = None,
    ema: bool = False,
    prune: bool = False,
    parts: Sequence[str] = (),
    variant: str | None = None,
    shard: int = SHARD,
    progress: Progress | None = None,
    change: Change | None = None,
) -> Converted:
    """Write a model in another layout or precision.

    A file that stays a file keeps every tensor and name, also one that is no checkpoint (a LoRA, a VAE), unless it is
    pruned or its averaged copy is taken.

    Args:
        source: safetensors, torch or GGUF file, or a diffusers folder.
        out: a path that does not exist: `<name>.safetensors`, or a folder.
        layout: as `out` is named where None: `.safetensors` is a single file.
        dtype: of floating-point numbers; None keeps them (packed ones become float32). `fp8`, of single files only,
            keeps the matrices of the denoising network as float8_e4m3fn with a scale each, everything else in float16.
        ema: take the averaged copy of the U-Net.
        prune: leave out what no picture needs (averaged copies, leftovers of training).
        parts: the names of the networks to convert; all of them if empty.
        variant: of a folder's weight files, for example `fp16`.
        shard: bytes of one file of a folder.
        progress: called as `(bytes written, bytes in all)`.
        change: what else happens to the networks (`engine/merging.py`).

    Raises:
        CheckpointError: the source is broken or of no known family, or the other layout cannot say what it is.
        OutputError: `out` is there already, or cannot be written.
        RequestError: an unknown part or type, or a layout that does not fit the name or the type.
    """
    to = _layout(out, layout, dtype)
    if out.exists():
        raise OutputError(f"{out} is there already; remove it or choose another name")
    if to == "single" and not source.is_dir() and not (ema or prune or parts or change):
        return _retyped(open_weights(source), out, dtype, progress)
    job = _job(source, variant, ema, tuple(parts), dtype)
    if change is not None:
        model = job.model or job.family.assemble(job.opened)
        job = replace(job, pieces=change(job.pieces, model))
    with _staged(out) as path:
        if to == "single":
            entries = _single_entries(job)
            write_entries(path, entries, job.metadata, progress)
        else:
            entries = _write_folder(job, path, shard, progress)
        if job.model is not None:
            _check_same(job.model, path, to)
    size = sum(entry.nbytes for entry in entries)
    sha = job.metadata["reverie.source_sha256"]
    return Converted(out, job.family.name, to, len(entries), size, sha, tuple(_notes(job, to)))


def _layout(out: Path, layout: Layout | None, dtype: Precision | None) -> Layout:
    named: Layout = "single" if out.suffix == ".safetensors" else "diffusers"
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"unknown type {dtype!r}; known: {', '.join(DTYPES)}")
    if layout not in (None, "single", "diffusers"):
        raise RequestError(f"unknown layout {layout!r}; known: single, diffusers")
    if layout is not None and layout != named:
        raise RequestError(f"{out} cannot be of the layout {layout}: single files end in .safetensors, folders do not")
    if named == "diffusers" and dtype == "fp8":
        raise RequestError("fp8 with scales is a layout of single files; choose a name that ends in .safetensors")
    return named


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A path beside `out` that gets its name when everything went well; else nothing is left behind."""
    staged = out.with_name(f".{out.name}.partial")
    try:
        yield staged
        staged.rename(out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        if staged.is_dir():
            shutil.rmtree(staged, ignore_errors=True)
        else:
            staged.unlink(missing_ok=True)


def _retyped(file: WeightFile, out: Path, dtype: Precision | None, progress: Progress | None) -> Converted:
    """The same tensors under the same names."""
    sha = hash_paths([file.path])
    entries = entries_of([file], dtype=None if dtype is None else DTYPES[dtype])
    if dtype == "fp8":
        sight = look(file.tensors)
        if not sight.network:
            raise RequestError(f"{file.path} has no denoising network, of which fp8 is made; choose float16")
        entries = _scaled(entries, sight.prefix, entries_of([file]))
    with _staged(out) as path:
        write_entries(path, entries, _metadata([file], sha), progress)
    size = sum(entry.nbytes for entry in entries)
    return Converted(out, "", "single", len(entries), size, sha)


def _job(source: Path, variant: str | None, ema: bool, parts: tuple[str, ...], dtype: Precision | None) -> _Job:
    family, opened = open_checkpoint(source, variant, ema=ema)
    unknown = [part for part in parts if part not in opened.pieces]
    if unknown:
        raise RequestError(f"{source} has no {' and no '.join(unknown)}; it has {', '.join(opened.pieces)}")
    model = family.assemble(opened)
    plan = family.plan(opened)
    pieces = opened.pieces if opened.file is None else family.open_file(DeferredFile.of(opened.file), ema)
    pieces = {name: _told(piece, plan) for name, piece in pieces.items() if not parts or name in parts}
    paths = sorted({path for piece in opened.pieces.values() for path in piece.files})
    metadata = _metadata([open_weights(path) for path in paths], hash_paths(paths))
    whole = model if set(pieces) == set(opened.pieces) else None
    return _Job(family, opened, pieces, plan, whole, dtype, metadata)


def _told(piece: Piece, plan: Plan) -> Piece:
    """A network with what no header says of it: the scale of the latents."""
    return piece.changed(**plan.scale) if piece.part == "vae" and piece.by_shape else piece


def _metadata(files: Iterable[WeightFile], sha: str) -> dict[str, str]:
    found = {key: value for file in files for key, value in file.metadata.items() if not key.startswith(DROPPED)}
    return found | {"reverie.source_sha256": sha}


def _notes(job: _Job, to: Layout) -> Iterator[str]:
    if job.opened.file is not None:
        left = sum(ignored(name) and not name.startswith(MARKS) for name in job.opened.file.tensors)
        if left:
            yield f"{left} tensors of {job.opened.path.name} that no picture needs were left out"
    if to == "single" and job.opened.own:
        yield "the defaults of its reverie.json were left out: a single file has no place for them"


# The single file


def _single_entries(job: _Job) -> list[Entry]:
    """Every tensor under its name in a single file."""
    named = {part: (piece.config, dict(piece.tensors())) for part, piece in job.pieces.items()}
    tensors = job.family.join_file(named)
    entries = [*_entries(tensors, job.dtype), *_marks(job)]
    if job.dtype != "fp8":
        return entries
    prefix = look(tensors).prefix
    return _scaled(entries, prefix, _entries(tensors, None))


def _entries(tensors: Mapping[str, Tensor], dtype: Precision | None) -> list[Entry]:
    return [_entry(name, tensor, dtype) for name, tensor in sorted(tensors.items())]


def _entry(name: str, tensor: Tensor, dtype: Precision | None) -> Entry:
    stored = plain(tensor)
    kind = stored.dtype if dtype is None or not stored.dtype.is_floating_point else DTYPES[dtype]
    return Entry(name, kind, tuple(stored.shape), lambda: unpacked(now(stored)).to(kind))


def _scaled(entries: Sequence[Entry], prefix: str, exact: Sequence[Entry]) -> list[Entry]:
    """With the matrices under a prefix in 8 bits, each with its scale, as `checkpoint/fp8.py` and ComfyUI read them.

    Args:
        exact: the same tensors in their own precision, from which the 8 bits are made.
    """
    full = {entry.name: entry for entry in exact}
    found = [Entry(f"{prefix}scaled_fp8", FP8, (0,), lambda: torch.empty(0, dtype=FP8))]
    for entry in entries:
        matrix = len(entry.shape) == 2 and entry.name.endswith(".weight") and entry.dtype.is_floating_point
        if matrix and entry.name.startswith(prefix) and not entry.name.endswith("label_emb.weight"):
            found += _in_eight_bits(full[entry.name])
        else:
            found.append(entry)
    return found


def _in_eight_bits(entry: Entry) -> list[Entry]:
    @cache
    def scale() -> float:
        largest = float(entry.load().float().abs().amax()) if entry.nbytes else 0.0
        return largest / LARGEST or 1.0

    name = entry.name.removesuffix(".weight")
    return [
        Entry(f"{name}.scale_weight", torch.float32, (1,), lambda: torch.tensor([scale()])),
        Entry(entry.name, FP8, entry.shape, lambda: (entry.load().float() / scale()).clamp(-LARGEST, LARGEST).to(FP8)),
    ]


def _marks(job: _Job) -> list[Entry]:
    """Tensors that say what the network predicts: those of the source, or what its folder's scheduler says."""
    file, scheduler = job.opened.file, job.plan.scheduler
    if file is not None:
        return entries_of([file], rename=lambda name: name if name.startswith(MARKS) else None)
    if job.family.name == "sd3" or job.family.network not in job.pieces:
        return []
    if str(scheduler.get("_class_name", "")).startswith("EDM"):
        return _edm_marks(job)
    if read_scheduler(scheduler).parameterisation.name != "v_prediction":
        return []
    marks = {"v_pred": torch.empty(0)}
    if scheduler.get("rescale_betas_zero_snr"):
        marks["ztsnr"] = torch.empty(0)
    return _entries(marks, None)


def _edm_marks(job: _Job) -> list[Entry]:
    if job.plan.scheduler.get("prediction_type") == "v_prediction":  # CosXL
        ends = {f"edm_vpred.{end}": float(job.plan.scheduler[end]) for end in ("sigma_min", "sigma_max")}
        return _entries({name: torch.tensor([value]) for name, value in ends.items()}, None)
    vae = job.opened.pieces["vae"].config  # Playground 2.5
    shape = (1, vae.latent_channels, 1, 1)
    values = {"edm_mean": vae.latents_mean, "edm_std": vae.latents_std}
    return _entries({name: torch.tensor(value).reshape(shape) for name, value in values.items() if value}, None)


# The diffusers folder


def _write_folder(job: _Job, folder: Path, shard: int, progress: Progress | None) -> list[Entry]:
    """Networks with their configs, tokenizers, scheduler and index. Returns the entries of all networks."""
    entries = {part: _entries(piece.tensors(), job.dtype) for part, piece in job.pieces.items()}
    done, total = 0, sum(entry.nbytes for of_part in entries.values() for entry in of_part)
    folder.mkdir()
    for part, piece in job.pieces.items():
        (folder / part).mkdir()
        _write_config(job, piece, folder / part)
        told = _shifted(progress, done, total)
        write_sharded(folder / part, piece.kind.stems[0], entries[part], limit=shard, metadata=job.metadata,
                      progress=told)  # fmt: skip
        done += sum(entry.nbytes for entry in entries[part])
    if job.model is not None:
        _write_rest(job, job.model, folder)
    return [entry for of_part in entries.values() for entry in of_part]


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(before + done, total)


def _write_config(job: _Job, piece: Piece, folder: Path) -> None:
    """That of the source's folder as it is; else one from the network's shape."""
    there = job.opened.path / piece.part / "config.json"
    if not piece.by_shape and there.exists():
        shutil.copyfile(there, folder / "config.json")
        return
    size = {"sample_size": job.plan.size} if piece.part == "unet" else {}
    write_json(folder / "config.json", size | piece.kind.write(piece.config))


def _write_rest(job: _Job, model: Parts, folder: Path) -> None:
    """What stands beside the networks."""
    source = job.opened.path
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", job.plan.scheduler)
    for tower in model.towers:
        target = folder / tower.name.replace("text_encoder", "tokenizer")
        if tower.name in job.opened.tokenizers:
            shutil.copytree(job.opened.tokenizers[tower.name], target)
        else:
            tower.tokenizer.save(target)
    if source.is_dir():
        for name in ("model_index.json", "reverie.json"):
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        return
    write_json(folder / "model_index.json", _index(job, model))


def _index(job: _Job, model: Parts) -> dict[str, Any]:
    """`model_index.json`: the pipeline, and library and class of everything that it is made of.

    Raises:
        CheckpointError: a variant whose folder needs networks that no single file holds.
    """
    name, variant = job.family.name, model.identity.variant
    if variant not in PIPELINES.get(name, {}):
        raise CheckpointError(
            f"{job.opened.path} is the variant {variant} of {job.family.title}; its folder needs networks that are not "
            "in the file, so that only single files can be written of it"
        )
    index: dict[str, Any] = {"_class_name": PIPELINES[name][variant]}
    index |= {part: [None, None] for part in OPTIONAL.get(name, ())}
    if name == "sdxl":
        index["force_zeros_for_empty_prompt"] = model.zero_empty
        if variant == "refiner":
            index |= {"requires_aesthetics_score": True, "text_encoder": [None, None], "tokenizer": [None, None]}
    if name == "sd3" and "text_encoder_3" not in job.pieces:
        index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    for part, piece in job.pieces.items():
        index[part] = _class_of(piece)
    for tower in model.towers:
        kind = "T5TokenizerFast" if isinstance(tower.module, T5Encoder) else "CLIPTokenizer"
        index[tower.name.replace("text_encoder", "tokenizer")] = ["transformers", kind]
    index["scheduler"] = ["diffusers", job.plan.scheduler["_class_name"]]
    return index


def _class_of(piece: Piece) -> list[str]:
    json = piece.kind.write(piece.config)
    return ["diffusers", json["_class_name"]] if "_class_name" in json else ["transformers", json["architectures"][0]]


# Whether it is the same model


def _check_same(model: Parts, path: Path, to: Layout) -> None:
    """Open what was written and compare everything that decides a picture.

    Raises:
        CheckpointError: what is otherwise, which the layout cannot say.
    """
    try:
        family, opened = open_checkpoint(path)
        differences = list(_differences(model, family.assemble(opened)))
    except CheckpointError as error:
        differences = [str(error)]
    if differences:
        kind = "a single file" if to == "single" else "a diffusers folder"
        raise CheckpointError(f"{kind} cannot hold this model: {'; '.join(differences[:3])}")


def _differences(model: Parts, written: Parts) -> Iterator[str]:
    if model.identity.family != written.identity.family:
        yield f"it would be read as {written.identity.family}, not {model.identity.family}"
        return
    ours, theirs = model.modules(), written.modules()
    for part in ours.keys() | theirs.keys():
        if part not in ours or part not in theirs:
            yield f"{part} would be {'lost' if part in ours else 'added'}"
            continue
        before, after = asdict(ours[part].config), asdict(theirs[part].config)  # type: ignore[call-overload]
        for key in sorted(before):
            if before[key] != after[key] and key not in HELD:
                yield f"{key} of {part} would be read as {after[key]}, not {before[key]}"
    if model.parameterisation.name != written.parameterisation.name:
        yield f"it would be read as {written.parameterisation.name}, not {model.parameterisation.name}"
    elif not _same_noise(model, written):
        yield "its noise schedule would be read as another"
    for tower, other in zip(model.towers, written.towers, strict=True):
        if not _same_words(tower.tokenizer, other.tokenizer):
            yield f"the tokenizer of {tower.name} would be the published one, which is another"


def _same_noise(model: Parts, written: Parts) -> bool:
    one, two = model.process, written.process
    return type(one) is type(two) and torch.equal(one.sigmas, two.sigmas)


def _same_words(one: ClipTokenizer | T5Tokenizer, two: ClipTokenizer | T5Tokenizer) -> bool:
    facts = [(t.vocab_size, t.eos, t.pad, t.encode(PROBE)) for t in (one, two)]
    return facts[0] == facts[1]
