"""Textual inversions (Gal et al. 2022): words of a prompt that stand for learned vectors. Every published file format.

| written by                          | names in the file                                             |
| ----------------------------------- | ------------------------------------------------------------- |
| the paper's code, AUTOMATIC1111     | `string_to_param.*`, `(k, D)`; in pictures, too               |
| diffusers                           | the word itself, `<cat-toy>`, `(D)` or `(k, D)`               |
| sd-scripts, OneTrainer              | `emb_params`                                                  |
| for several text encoders, any of them | `clip_l`, `clip_g`, `t5xxl`                                |
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reverie.adapters.embedded_picture import is_picture, read_picture
from reverie.adapters.kinds import MODELS, SD3
from reverie.checkpoint.source import open_weights
from reverie.checkpoint.weightfile import WeightFile, shown, shown_shape
from reverie.errors import CheckpointError, RequestError
from reverie.families.base import Parts
from reverie.text.prompt import DIALECTS

# The text encoder that a name in a file stands for.
ENCODERS: Mapping[str, str] = {
    "clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2",
    "t5xxl": "text_encoder_3", "t5": "text_encoder_3",
}  # fmt: skip
NESTED = "string_to_param"
UNNAMED = {"*", "emb_params", "tensor"}  # names that are no word
NO_STEM = {"learned_embeds", "embeddings", "diffusion_pytorch_model", "pytorch_lora_weights"}
OUTPUTS = ("_out",)  # what OneTrainer learned to add behind the encoder, which no other program applies
COMFY = "embedding:"  # what stands before a word in prompts of ComfyUI
SHORT = 12  # digits of a hash in A1111's pictures
Tables = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word of prompts, and what stands for it.

    Attributes:
        name: the word: the file's name without its ending, or the word in a file whose name says nothing.
        vectors: `(k, D)` float32, by the folder of the text encoder.
        digest: SHA-256 of the file.
        token: the word that the file itself holds, `<cat-toy>`; empty if none.
    """

    name: str
    vectors: Mapping[str, Tensor]
    path: Path
    digest: str
    token: str = ""

    @property
    def short(self) -> str:
        """The hash as A1111 writes it into pictures (`TI hashes`)."""
        return self.digest[:SHORT]

    def words(self, dialect: str = "a1111") -> tuple[str, ...]:
        """How prompts of a dialect call it: ComfyUI's by `embedding:name`, all others by the bare word or token."""
        names = dict.fromkeys(word for word in (self.name, self.token) if word)
        start = COMFY if DIALECTS.name(dialect) == "comfy" else ""
        return tuple(start + word for word in names)


def open_embedding(path: Path, parts: Parts) -> Embedding:
    """Open an embedding of any format for a model.

    Raises:
        CheckpointError: none, broken, or made for another model, which is named.
    """
    token, tables = read_picture(path) if is_picture(path) else _tables(open_weights(path))
    vectors = placed(tables, parts, path)
    token = token or next((name for name in tables if name not in UNNAMED | set(ENCODERS)), "")
    name = token if path.stem in NO_STEM and token else path.stem
    return Embedding(name, vectors, path, hashlib.sha256(path.read_bytes()).hexdigest(), token)


def vectors_for(part: str, embeddings: Iterable[Embedding], dialect: str = "a1111") -> dict[str, Tensor]:
    """What `text.embed.Embedder(vectors=...)` takes: the vectors of one text encoder by the words of prompts.

    Args:
        part: the folder of the text encoder. Words that have nothing for it are read as ordinary text there.

    Raises:
        RequestError: two files of one word. Upper and lower case are one to CLIP.
    """
    found: dict[str, Tensor] = {}
    owners: dict[str, Path] = {}
    for embedding in embeddings:
        for word in embedding.words(dialect):
            other = owners.setdefault(word.lower(), embedding.path)
            if other != embedding.path:
                raise RequestError(f"two embeddings are called {word!r}: {other} and {embedding.path}; rename one")
            if part in embedding.vectors:
                found[word] = embedding.vectors[part]
    return found


def placed(tables: Tables, parts: Parts, path: Path) -> dict[str, Tensor]:
    """The vectors of a file by the text encoders that they are for, `(k, D)` float32.

    Raises:
        CheckpointError: not floats of that shape, NaN, or for text encoders that the model has not.
    """
    checked = {name: _checked(name, table, path) for name, table in tables.items()}
    widths = {tower.name: tower.module.config.width for tower in parts.towers}
    named = {ENCODERS.get(name, "text_encoder"): table for name, table in checked.items() if name in ENCODERS}
    if not named and len(checked) == 1 and len(widths) == 1:
        named = dict(zip(widths, checked.values(), strict=True))
    if not named and len(checked) > 1:
        words = ", ".join(map(shown, list(checked)[:3]))
        raise CheckpointError(f"{path} holds {len(checked)} words ({words}); expected an embedding of one")
    counts = {len(table) for table in named.values()}
    if not named or any(widths.get(part) != table.shape[1] for part, table in named.items()):
        found = " and ".join(map(str, sorted({table.shape[1] for table in checked.values()})))
        raise CheckpointError(
            f"{path} is an embedding for {_family(checked)} ({found} wide); the text encoder"
            f"{'s' if len(widths) > 1 else ''} of this {parts.identity.family} model "
            f"{'are' if len(widths) > 1 else 'is'} {' and '.join(map(str, widths.values()))} wide"
        )
    if len(counts) > 1:
        raise CheckpointError(
            f"{path} has {' and '.join(map(str, sorted(counts)))} vectors for one word; it is damaged"
        )
    return named


def bundled(tensors: Iterable[str]) -> dict[str, dict[str, str]]:
    """The embeddings in a LoRA file (`bundle_emb.WORD.string_to_param.*`): word -> name of table -> tensor's name."""
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        word, _, table = name.removeprefix("bundle_emb.").rpartition(".")
        word = word.removesuffix(f".{NESTED}")
        if name.startswith("bundle_emb.") and word and not table.endswith(OUTPUTS):
            found.setdefault(word, {})[table] = name
    return found


def _tables(file: WeightFile) -> tuple[str, dict[str, Tensor]]:
    """The token that a file holds, if any, and its tables by name."""
    names = [name for name, info in file.tensors.items() if info.dtype.is_floating_point]
    nested = [name for name in names if name.startswith(f"{NESTED}.")]
    tables = {
        name.removeprefix(f"{NESTED}."): file.tensor(name) for name in nested or names if not name.endswith(OUTPUTS)
    }
    if not tables or any(len(file.tensors[name].shape) > 2 for name in names) or len(names) > 8:
        first = ", ".join(list(file.tensors)[:3])
        raise CheckpointError(f"{file.path} is no embedding: {len(file.tensors)} tensors, the first are {first}")
    token = next((name for name in tables if name not in UNNAMED | set(ENCODERS)), "")
    return token, tables


def _checked(name: str, table: Tensor, path: Path) -> Tensor:
    rows = table[None] if table.ndim == 1 else table
    if rows.ndim != 2 or not rows.numel():
        shape = shown_shape(tuple(table.shape))
        raise CheckpointError(f"{path}: {shown(name)} has shape {shape}; expected vectors, k x width")
    if not torch.isfinite(rows).all():
        raise CheckpointError(f"{path}: {shown(name)} holds NaN or infinity; it is damaged: fetch it again")
    return rows.detach().float()


def _family(tables: Tables) -> str:
    """The models that tables of these names and widths go with."""
    if {"t5xxl", "t5"} & set(tables):
        return SD3
    if len(tables) > 1:
        return MODELS[2048]
    width = next(iter(tables.values())).shape[1]
    return MODELS.get(width, "a model whose text encoder is as wide")
