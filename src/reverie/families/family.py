"""What a family is to the rest: who it claims, what it opens, and how it puts the networks together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from reverie.checkpoint.source import WeightFile
from reverie.families.base import Parts
from reverie.families.json_config import Json
from reverie.families.pieces import Kind, Piece, Pieces
from reverie.families.pieces import Parts as NamedParts
from reverie.families.single import Sight, TextRule
from reverie.registry import Registry

if TYPE_CHECKING:
    from reverie.families.assembly import Plan

Evidence = tuple[str, str]


@dataclass(frozen=True)
class Opened:
    """A checkpoint, its networks found but not built.

    Attributes:
        layout: in words.
        pieces: its networks, by the names of their folders.
        evidence: pairs of a claim and what supports it.
        file: where the denoising network is, if in a single file: it may hold signs of what the network predicts.
        index: `model_index.json`; empty for a file.
        scheduler: `scheduler_config.json`; None for a file.
        own: `reverie.json`.
        tokenizers: folders of tokenizers by the names of their text encoders.
        size: rows and columns of latents that the model was made for, where a config says so.
    """

    path: Path
    layout: str
    pieces: Pieces
    evidence: tuple[Evidence, ...] = ()
    file: WeightFile | None = None
    index: Json = field(default_factory=dict)
    scheduler: Json | None = None
    own: Json = field(default_factory=dict)
    tokenizers: Mapping[str, Path] = field(default_factory=dict)
    size: tuple[int, int] | None = None

    def with_piece(self, piece: Piece, source: Path) -> "Opened":
        """The same with a network from elsewhere."""
        evidence = (piece.part, f"from {source}, as asked for")
        return replace(self, pieces=self.pieces | {piece.part: piece}, evidence=(*self.evidence, evidence))


@dataclass(frozen=True)
class Family:
    """A family of models: one folder of this package.

    Attributes:
        name: `sd1`.
        title: in words.
        network: the name of the denoising network's folder.
        kinds: of the networks in a diffusers folder, by the names of their folders.
        texts: its text encoders, in their order.
        pipelines: the classes of diffusers that it opens.
        claims_file: what in a header shows that a file is of this family; None if nothing does.
        claims_networks: the same for the networks of a folder.
        open_file: `(file, whether the averaged copy is wanted) -> networks`.
        join_file: config and tensors of networks -> the tensors of a single file; the other way round.
        plan: how they go together, without building them.
        assemble: the networks, put together.
    """

    name: str
    title: str
    network: str
    kinds: Mapping[str, Kind]
    texts: tuple[TextRule, ...]
    pipelines: tuple[str, ...]
    claims_file: Callable[[Sight], str | None]
    claims_networks: Callable[[Pieces], str | None]
    open_file: Callable[[WeightFile, bool], Pieces]
    join_file: Callable[[NamedParts], dict[str, Tensor]]
    plan: "Callable[[Opened], Plan]"
    assemble: Callable[[Opened], Parts]


FAMILIES = Registry[Family]("family")


def by_text_encoder(pieces: Pieces, activation: str, context_width: int) -> str | None:
    """What shows a U-Net's family by its one text encoder: the activation; without it, how wide the prompt is."""
    text, unet = pieces.get("text_encoder"), pieces["unet"]
    if text is not None:
        return f"text_encoder/config.json: hidden_act {activation}" if text.config.activation == activation else None
    return f"a U-Net whose prompt is {context_width} wide" if unet.config.context_width == context_width else None


def by_prompt(sight: Sight, context_width: int) -> str | None:
    """What shows the family of a U-Net that is alone in a file: how wide the prompt is."""
    alone = not sight.has_text and sight.context_width == context_width
    return f"a U-Net whose prompt is {context_width} wide, and no text encoder" if alone else None


def load_all() -> list[Family]:
    """Every family: imports `families/*/family.py`."""
    for file in sorted(Path(__file__).parent.glob("*/family.py")):
        import_module(f"reverie.families.{file.parent.name}.family")
    return [FAMILIES[name] for name in FAMILIES]
