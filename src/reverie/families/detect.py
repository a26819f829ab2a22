"""Which family a path belongs to, from its header alone, and the networks in it.

The header decides, never the name of the file. Each family says what it sees of itself; two that do, or none, is an
error that says what was seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from reverie.checkpoint.source import WeightFile, open_weights
from reverie.collector import paused_collector
from reverie.errors import CheckpointError
from reverie.families import single
from reverie.families.base import Parts
from reverie.families.family import Family, Opened, load_all
from reverie.families.folder import open_part
from reverie.families.json_config import Json, JsonConfig, read_json
from reverie.families.lone import text_places, texts_of, vae_of, vae_prefix
from reverie.families.pieces import about
from reverie.families.single import TEXT_ROOTS, Sight, look

Source = str | Path
Sources = Source | Sequence[Source]

# Signs of files that are no whole model, or of a family that is not opened: (a prefix, or part of a name; what it is).
SIGNS: tuple[tuple[str, str], ...] = (
    ("conditioner.embedders.1.", "Stable Diffusion XL"),
    ("conditioner.embedders.0.model.", "the Stable Diffusion XL refiner"),
    ("cond_stage_model.model.", "Stable Diffusion 2"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("double_blocks.", "Flux"),
    ("lora_unet_", "a LoRA, not a checkpoint"),
    (".lora_", "a LoRA, not a checkpoint"),
    ("controlnet_cond_embedding.", "a ControlNet, not a checkpoint"),
    ("input_hint_block.", "a ControlNet, not a checkpoint"),
    ("down_blocks.0.resnets.0.", "one part of a diffusers folder; open the folder that holds model_index.json"),
)


@paused_collector()
def load_parts(
    path: Path,
    variant: str | None = None,
    *,
    vae: Source | None = None,
    unet: Source | None = None,
    text_encoder: Sources | None = None,
    ema: bool = False,
) -> Parts:
    """Open a file or a folder of any known family, with some of its networks from elsewhere.

    Args:
        path: a diffusers folder, a file with a whole model, or one with a denoising network alone.
        variant: of a folder's weight files, for example `fp16`.
        vae, unet, text_encoder: the file or folder that this network is to come from: one with it alone, or with a
            whole model. `unet` is the transformer of Stable Diffusion 3, too; of text encoders there may be several.
        ema: take the averaged copy of the U-Net that a single file holds.

    Raises:
        CheckpointError: nothing there, broken, of no known family, or with a part missing; the message says what was
            seen.
    """
    family, opened = open_checkpoint(path, variant, ema=ema)
    if unet is not None:
        opened = _with_network(opened, family, Path(unet))
    if vae is not None:
        opened = opened.with_piece(vae_of(Path(vae)), Path(vae))
    texts = [text_encoder] if isinstance(text_encoder, str | Path) else text_encoder or ()
    for piece, source in texts_of([Path(source) for source in texts], family, opened.pieces).values():
        opened = opened.with_piece(piece, source)
    return family.assemble(opened)


def open_checkpoint(path: Path, variant: str | None = None, *, ema: bool = False) -> tuple[Family, Opened]:
    """The family of a path, and the networks in it, none of them built.

    Raises:
        CheckpointError: see `load_parts`.
    """
    if not path.is_dir():
        return _open_file(open_weights(path), ema)
    if not (path / "model_index.json").exists():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise CheckpointError(f"{path} is not a diffusers folder: no model_index.json; found {found}")
    if ema:
        raise CheckpointError(f"{path} is a diffusers folder, which holds one copy of its weights; load it without ema")
    return _open_folder(path, variant)


def _only(claims: Mapping[str, str], families: Sequence[Family], path: Path, seen: str) -> Family:
    """The one family that claims a path."""
    if len(claims) == 1:
        return next(family for family in families if family.name in claims)
    if claims:
        both = "; ".join(f"{name} ({why})" for name, why in claims.items())
        raise CheckpointError(f"{path} could be of several families: {both}")
    raise CheckpointError(f"{path} is of no family that this version opens: {seen}")


# A single file


def _open_file(file: WeightFile, ema: bool) -> tuple[Family, Opened]:
    families, sight = load_all(), look(file.tensors)
    claims = {family.name: why for family in families if (why := family.claims_file(sight)) is not None}
    family = _only(claims, families, file.path, _describe(sight))
    with about(f"{file.path} looks like {family.title}, but "):
        pieces = family.open_file(file, ema)
    layout = "single file (LDM)" if sight.prefix else f"{family.network} alone"
    evidence = [
        (f"family {family.name}", claims[family.name]),
        (f"layout {layout}", f"{len(file.tensors)} tensors, no config needed"),
        *(("left out", what) for what in single.beside(file.tensors)),
    ]
    if ema:
        evidence.append(("averaged copy", "asked for: model_ema.*"))
    return family, Opened(file.path, layout, pieces, tuple(evidence), file)


def _describe(sight: Sight) -> str:
    """What can be said of a file that no family claims."""
    if sight.network == "unet":
        texts = [f"{root}*" for root in TEXT_ROOTS if sight.has(root)]
        beside = f"beside {' and '.join(texts)}" if texts else "without a text encoder"
        vector = f" and {sight.vector}" if sight.vector else ""
        return f"a U-Net whose prompt is {sight.context_width} wide{vector}, {beside}{_sign(sight)}"
    if vae_prefix(sight.header) is not None:
        return "it is a VAE alone; open a checkpoint and give this as vae="
    if text_places(sight.header):
        return "it is a text encoder without U-Net; open a checkpoint and give this as text_encoder="
    first = ", ".join(list(sight.header)[:3])
    return _sign(sight).removeprefix("; ") or f"{len(sight.header)} tensors, the first are {first}"


def _sign(sight: Sight) -> str:
    for sign, what in SIGNS:
        if any(sign in name for name in sight.header):
            return f"; it looks like {what}"
    return ""


# A diffusers folder


def _open_folder(path: Path, variant: str | None) -> tuple[Family, Opened]:
    index, families = read_json(path / "model_index.json"), load_all()
    kinds = {part: kind for family in families for part, kind in family.kinds.items()}
    pieces = {part: open_part(path / part, part, kinds[part], variant) for part in kinds if _listed(index, part)}
    claims = {family.name: why for family in families if (why := family.claims_networks(pieces)) is not None}
    said = str(index.get("_class_name"))
    family = _only(claims, families, path, f"a {said} of {' and '.join(pieces) or 'no networks'}")
    _check_class(said, family, families)
    tokenizers = {part: path / part.replace("text_encoder", "tokenizer") for part in pieces}
    own = path / "reverie.json"
    return family, Opened(
        path, "diffusers folder", pieces,
        ((f"family {family.name}", f"model_index.json: {said}; {claims[family.name]}"),
         ("layout diffusers folder", "model_index.json")),
        index=index, scheduler=read_json(path / "scheduler" / "scheduler_config.json"),
        own=read_json(own) if own.exists() else {},
        tokenizers={part: folder for part, folder in tokenizers.items() if _listed(index, folder.name)},
        size=_size(path / family.network / "config.json"),
    )  # fmt: skip


def _listed(index: Json, part: str) -> bool:
    """Whether a folder is said to have a part: `[library, class]`, both of them null where it does not."""
    value = index.get(part)
    return isinstance(value, list) and len(value) == 2 and None not in value


def _check_class(said: str, family: Family, families: Sequence[Family]) -> None:
    """Refuse an index that names a pipeline of another family: one of the two is not what it says."""
    others = [other.title for other in families if said in other.pipelines]
    if others and said not in family.pipelines:
        raise CheckpointError(
            f"model_index.json names {said}, which is {' or '.join(others)}, but the networks are those of "
            f"{family.title}; it opens {', '.join(family.pipelines)}"
        )


def _size(path: Path) -> tuple[int, int] | None:
    """Rows and columns of latents that a denoising network was made for."""
    config = JsonConfig(read_json(path), f"{path.parent.name}/config.json")
    if not config.has("sample_size"):
        return None
    rows, columns = config.each("sample_size", 0, 2)
    return rows, columns


# A denoising network from elsewhere


def _with_network(opened: Opened, family: Family, path: Path) -> Opened:
    """The same with the denoising network of another file or folder, and what that says of it."""
    if path.is_dir():
        return _with_folder(opened, family, path)
    file = open_weights(path)
    families, sight = load_all(), look(file.tensors)
    owners = [other for other in families if other.claims_file(sight) is not None]
    if sight.network != family.network or (owners and family not in owners):
        found = " or ".join(other.title for other in owners) or _describe(sight)
        raise CheckpointError(f"{path} is no {family.network} of {family.title}: {found}")
    with about(f"{path}: "):
        pieces = family.open_file(file, False)
    scheduler = None if len(pieces) > 1 else opened.scheduler
    return replace(opened.with_piece(pieces[family.network], path), file=file, scheduler=scheduler)


def _with_folder(opened: Opened, family: Family, path: Path) -> Opened:
    if not (path / "model_index.json").exists():
        piece = open_part(path, family.network, family.kinds[family.network])
        return replace(opened.with_piece(piece, path), file=None)
    other, source = _open_folder(path, None)
    if other is not family:
        raise CheckpointError(f"{path} is {other.title}; its {other.network} is none of {family.title}")
    taken = opened.with_piece(source.pieces[family.network], path)
    return replace(taken, file=None, scheduler=source.scheduler, size=source.size)
