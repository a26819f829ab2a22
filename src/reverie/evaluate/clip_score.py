"""CLIP score: how well pictures fit their prompts (Hessel et al. 2021, "CLIPScore")."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from reverie.checkpoint.source import WeightFile, open_weights
from reverie.errors import CheckpointError
from reverie.families import ldm, shapes
from reverie.families.configs import text_config, text_json
from reverie.families.folder import open_part
from reverie.families.json_config import Json
from reverie.families.lone import text_places
from reverie.families.pieces import Kind, Piece, T, about, tidied_clip
from reverie.families.single import TextPlace, piece_of, under
from reverie.families.vision import VISION, vision_of
from reverie.nets.clip_text import ClipText
from reverie.nets.clip_vision import ClipVision, clip_pixels
from reverie.text.tokenizer import ClipTokenizer

PROJECTION = "text_projection.weight"
OPEN_CLIP_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
BATCH = 32


@dataclass(frozen=True, eq=False)
class Clip:
    """Both towers of one CLIP, whose answers are compared."""

    text: ClipText
    vision: ClipVision
    tokenizer: ClipTokenizer

    @torch.no_grad()
    def told(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of prompts `(N, D)` of length 1. What is longer than CLIP reads is cut off."""
        ids = torch.tensor([self.tokenizer(prompt).ids for prompt in prompts])
        device = self.text.text_model.embeddings.position_embedding.weight.device
        pooled = self.text.encode(ids.to(device), eos=self.tokenizer.eos)[1]
        return F.normalize(pooled, dim=1).cpu()

    @torch.no_grad()
    def seen(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings of pictures `(N, D)` of length 1."""
        pixels = torch.cat([clip_pixels(picture, self.vision.config.image_size) for picture in pictures])
        embedded: Tensor = self.vision(pixels)
        return F.normalize(embedded, dim=1).cpu()


def clip_scores(
    clip: Clip,
    pictures: Sequence[Callable[[], Image.Image]],
    prompts: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """`100 max(cos, 0)` of each picture with its prompt: `(N,)`.

    The paper's own scale is 2.5 instead of 100.

    Args:
        pictures: each is opened when its turn has come.
        progress: called as `(pictures done, pictures in all)`.
    """
    found = []
    for start in range(0, len(pictures), BATCH):
        part = slice(start, start + BATCH)
        cosines = (clip.seen([opened() for opened in pictures[part]]) * clip.told(prompts[part])).sum(1)
        found.append(100 * cosines.clamp(min=0))
        if progress:
            progress(min(start + BATCH, len(pictures)), len(pictures))
    return torch.cat(found)


def open_clip(path: Path, device: torch.device) -> Clip:
    """Both towers, in float32.

    Args:
        path: a folder as transformers writes a `CLIPModel`, or a file that holds both towers under the names of
            transformers or of OpenCLIP. The vocabulary is the folder's, or the published one.

    Raises:
        CheckpointError: one tower is missing, or they do not belong together.
    """
    seeing = vision_of(path)
    reading = open_part(path, "text_encoder", TEXT) if path.is_dir() else _in_file(open_weights(path))
    # In one CLIP both have the same; of a lone text encoder its shape does not tell.
    text = reading.changed(activation=seeing.config.activation).build().to(device, torch.float32)
    vision = seeing.build().to(device, torch.float32)
    assert isinstance(text, ClipText)
    assert isinstance(vision, ClipVision)
    widths = text.config.projection_width, vision.config.projection_width
    if 0 in widths or widths[0] != widths[1]:
        raise CheckpointError(
            f"{path} cannot compare words with pictures: its towers project to {widths[0]} and {widths[1]} channels"
        )
    own = path.is_dir() and any((path / name).exists() for name in ("vocab.json", "tokenizer.json"))
    return Clip(text, vision, ClipTokenizer.from_folder(path) if own else ClipTokenizer.published())


def _read(json: Json, names: Collection[str]) -> object:
    inner = json.get("text_config")
    if not isinstance(inner, Mapping):
        raise CheckpointError("config.json describes no whole CLIP: it has no text_config")
    shared = {name: json[name] for name in ("projection_dim",) if name in json}
    return text_config({"model_type": "clip_text_model", **inner, **shared}, projected=PROJECTION in names)


def _of_text(tensors: Mapping[str, T]) -> dict[str, T]:
    """Those of the text encoder, without what old versions wrote beside."""
    return tidied_clip({n: t for n, t in tensors.items() if n.startswith("text_model.") or n == PROJECTION})


TEXT = Kind("text encoder", ClipText, _read, text_json, _of_text, VISION.stems)


def _in_file(file: WeightFile) -> Piece:
    """The text encoder beside an image encoder."""
    places = [place for place, t5 in text_places(file.tensors) if not t5 and not place.prefix.endswith("visual.")]
    if not places:
        raise CheckpointError(f"{file.path} holds no text encoder beside its image encoder; expected a whole CLIP")
    with about(f"{file.path}: "):
        return _at(file, places[0])


def _at(file: WeightFile, place: TextPlace) -> Piece:
    wanted = OPEN_CLIP_TEXT if place.open_clip else ("text_model.", PROJECTION)
    names = {name: source for name, source in under(file, place.prefix).items() if name.startswith(wanted)}
    found = {name: tuple(file.tensors[source].shape) for name, source in names.items()}
    if not place.open_clip:
        config = shapes.clip_config(tidied_clip(found), "quick_gelu")
        return piece_of(file, "text_encoder", TEXT, config, names, tidied_clip)
    other = ldm.open_clip_config(found)
    return piece_of(file, "text_encoder", TEXT, other, names, lambda t: ldm.open_clip_from_file(t, other))
