"""A VAE or text encoders, wherever they are: alone in a file, in a folder of their own, or in a whole model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reverie.checkpoint.source import WeightFile, open_weights
from reverie.errors import CheckpointError
from reverie.families import ldm
from reverie.families.family import Family
from reverie.families.folder import open_part
from reverie.families.json_config import read_json
from reverie.families.pieces import VAE, Piece, Pieces, about
from reverie.families.shapes import Header
from reverie.families.single import TextPlace, TextRule, vae_piece

# Names by which a network is found under whatever prefix.
VAE_SIGNS = ("encoder.down.0.block.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight")
CLIP_SIGNS = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight")
OPEN_CLIP_SIGN, T5_SIGN = "transformer.resblocks.0.ln_1.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"
WIDE = 1024  # and wider are OpenCLIP's text encoders; those of OpenAI are not


@dataclass(frozen=True)
class FoundText:
    """A text encoder that was found.

    Attributes:
        width: of its states.
        read: as the text encoder that a rule is about.
    """

    width: int
    t5: bool
    read: Callable[[TextRule], Piece]


def vae_prefix(header: Header) -> str | None:
    """Where a VAE is in a file, if it is."""
    prefixes = (p for p in (*ldm.VAES, "") if any(p + sign in header for sign in VAE_SIGNS))
    return next(prefixes, None)


def text_places(header: Header) -> list[tuple[TextPlace, bool]]:
    """Where text encoders are in a file, and whether each is T5."""
    found: dict[str, tuple[TextPlace, bool]] = {}
    for name in header:
        for sign in (*CLIP_SIGNS, OPEN_CLIP_SIGN, T5_SIGN):
            if name.endswith(sign):
                prefix = name.removesuffix(sign)
                found.setdefault(prefix, (TextPlace(prefix, open_clip=sign == OPEN_CLIP_SIGN), sign == T5_SIGN))
                break
    return list(found.values())


def vae_of(path: Path) -> Piece:
    """The VAE of a file or folder.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_dir():
        return open_part(path / "vae" if (path / "model_index.json").exists() else path, "vae", VAE)
    file = open_weights(path)
    prefix = vae_prefix(file.tensors)
    if prefix is None:
        first = ", ".join(list(file.tensors)[:3])
        raise CheckpointError(f"{path} holds no VAE: {len(file.tensors)} tensors, the first are {first}")
    with about(f"{path}: "):
        return vae_piece(file, prefix)


def texts_of(sources: Sequence[Path], family: Family, pieces: Pieces) -> dict[str, tuple[Piece, Path]]:
    """The text encoders of files or folders, each as the one of the family that it fits, and where it was.

    One as wide as a text encoder that is there takes its place; else it is the one that is missing, the narrower the
    first.

    Args:
        pieces: the networks that are there.

    Raises:
        CheckpointError: none found, or more than the family has.
    """
    found = [(text, path) for path in sources for text in _found(path, family)]
    rules = {rule.part: rule for rule in family.texts}
    missing = [part for part in rules if part not in pieces]
    chosen: dict[str, tuple[Piece, Path]] = {}
    for text, path in sorted(found, key=lambda pair: pair[0].width):
        free = [part for part, rule in rules.items() if rule.t5 == text.t5 and part not in chosen]
        same = [part for part in free if part in pieces and pieces[part].config.width == text.width]
        absent = [part for part in free if part in missing]
        fitting = same or (absent[-1:] if text.width >= WIDE else absent) or free
        if not fitting:
            what = "T5" if text.t5 else f"text encoder of {text.width} channels"
            raise CheckpointError(f"{path} holds a {what} for which {family.title} has no place")
        with about(f"{path}: "):
            chosen[fitting[0]] = (text.read(rules[fitting[0]]), path)
    return chosen


def _found(path: Path, family: Family) -> list[FoundText]:
    if path.is_dir():
        whole = (path / "model_index.json").exists()
        folders = sorted(path.glob("text_encoder*")) if whole else [path]
        found = [_in_folder(folder, family) for folder in folders]
    else:
        file = open_weights(path)
        found = [_in_file(file, place, t5=t5) for place, t5 in text_places(file.tensors)]
    if not found:
        raise CheckpointError(f"{path} holds no text encoder")
    return found


def _in_folder(folder: Path, family: Family) -> FoundText:
    t5 = read_json(folder / "config.json").get("model_type") == "t5"
    kinds = [family.kinds[rule.part] for rule in family.texts if rule.t5 == t5]
    if not kinds:
        raise CheckpointError(f"{folder} holds a T5, which {family.title} has not")
    piece = open_part(folder, "text_encoder", kinds[0])
    return FoundText(piece.config.width, t5, lambda rule: replace(piece, part=rule.part))


def _in_file(file: WeightFile, place: TextPlace, *, t5: bool) -> FoundText:
    signs = ("token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight")
    tables = (t.shape for name, t in file.tensors.items() if name.startswith(place.prefix) and name.endswith(signs))
    shape = next(tables, ())
    return FoundText(shape[1] if len(shape) == 2 else 0, t5, lambda rule: rule.read(file, place))
