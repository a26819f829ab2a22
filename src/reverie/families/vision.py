"""CLIP's image encoder, wherever it is: in a folder, alone in a file, with its text encoder, or in a whole model."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from reverie.checkpoint.source import WeightFile, open_weights
from reverie.errors import CheckpointError
from reverie.families.folder import open_part
from reverie.families.json_config import Json, JsonConfig
from reverie.families.ldm import open_clip_layer
from reverie.families.pairs import Pair, from_file, shapes_from_file
from reverie.families.pieces import Kind, Piece, about
from reverie.families.shapes import Header, Shapes, count, need, shapes_of
from reverie.nets.clip_text import ACTIVATIONS
from reverie.nets.clip_vision import ClipVision, ClipVisionConfig

T = TypeVar("T")

PART = "image_encoder"  # the name of its folder in a model of diffusers
OURS, PROJECTION, OPEN_CLIP = "vision_model.", "visual_projection.weight", "visual."
SIGN, OPEN_CLIP_SIGN = "embeddings.patch_embedding.weight", "visual.conv1.weight"
# Of ViT-L, H and bigG (1024, 1280, 1664 channels): OpenAI's and OpenCLIP's configs. ViT-B has 12.
HEADS, BASE = 16, (768, 12)
OPENAI_WIDTH = 1024  # and narrower are those that OpenAI trained, with its own activation


def vision_config(json: Json, *, projected: bool = True) -> ClipVisionConfig:
    """From `image_encoder/config.json`, or that of a whole CLIP; transformers' defaults where a key is absent.

    Args:
        projected: whether its weights have a projection (`CLIPVisionModelWithProjection`): a config has its width in
            both cases.

    Raises:
        CheckpointError: a feature that no CLIP of Stable Diffusion has.
    """
    whole = json.get("model_type") == "clip"
    inner = json.get("vision_config") if whole else json
    c = JsonConfig(inner if isinstance(inner, Mapping) else {}, "image_encoder/config.json")
    c.require(model_type="clip_vision_model", num_channels=3)
    outer = JsonConfig(json, "image_encoder/config.json") if whole else c
    return ClipVisionConfig(
        width=c.count("hidden_size", 768),
        inner_width=c.count("intermediate_size", 3072),
        layers=c.few("num_hidden_layers", 12),
        heads=c.count("num_attention_heads", 12),
        image_size=c.count("image_size", 224),
        patch=c.count("patch_size", 32),
        activation=c.one_of("hidden_act", "quick_gelu", tuple(ACTIVATIONS)),
        eps=c.number("layer_norm_eps", 1e-5),
        projection_width=outer.count("projection_dim", 512) if projected else 0,
    )


def vision_json(config: ClipVisionConfig) -> dict[str, Any]:
    """What transformers' CLIPVisionModelWithProjection, or without a projection its CLIPVisionModel, reads."""
    return {
        "architectures": ["CLIPVisionModelWithProjection" if config.projection_width else "CLIPVisionModel"],
        "attention_dropout": 0.0,
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "image_size": config.image_size,
        "intermediate_size": config.inner_width,
        "layer_norm_eps": config.eps,
        "model_type": "clip_vision_model",
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "num_hidden_layers": config.layers,
        "patch_size": config.patch,
        "projection_dim": config.projection_width or config.width,
    }


def tidied(tensors: Mapping[str, T]) -> dict[str, T]:
    """The image encoder's tensors of a whole CLIP or of it alone; old versions wrote a buffer of positions, too."""
    if SIGN in tensors:
        tensors = {name if name == PROJECTION else f"{OURS}{name}": t for name, t in tensors.items()}
    kept = {name: t for name, t in tensors.items() if name.startswith(OURS) or name == PROJECTION}
    kept.pop(f"{OURS}embeddings.position_ids", None)
    return kept


def _read(json: Json, names: Collection[str]) -> ClipVisionConfig:
    return vision_config(json, projected=PROJECTION in names)


VISION = Kind("image encoder", ClipVision, _read, vision_json, tidied, ("model", "pytorch_model"))


@dataclass(frozen=True)
class VisionPlace:
    """Where an image encoder is in a file.

    Attributes:
        prefix: before its names.
        open_clip: under OpenCLIP's names.
    """

    prefix: str
    open_clip: bool


def vision_place(header: Header) -> VisionPlace | None:
    """Where an image encoder is in a file, if it is."""
    for name in header:
        if name.endswith(OPEN_CLIP_SIGN):
            return VisionPlace(name.removesuffix(OPEN_CLIP_SIGN) + OPEN_CLIP, open_clip=True)
        if name.endswith(SIGN):
            return VisionPlace(name.removesuffix(SIGN).removesuffix(OURS), open_clip=False)
    return None


def vision_piece(file: WeightFile, place: VisionPlace, part: str = PART) -> Piece:
    """The image encoder at a place of a file.

    Raises:
        CheckpointError: shapes that are those of no image encoder.
    """
    names = [name for name in file.tensors if name.startswith(place.prefix)]
    shapes = shapes_of(file.tensors, place.prefix)
    with about(f"{file.path}: "):
        config = _open_clip_config(shapes) if place.open_clip else config_of_shapes(tidied(shapes))

    def tensors() -> Mapping[str, Tensor]:
        found = {name.removeprefix(place.prefix): file.weight(name) for name in names}
        return from_file(_table(config), found, "such an image encoder") if place.open_clip else tidied(found)

    return Piece(part, VISION, config, tensors, (file.path,), f"the image encoder in {file.path}")


def open_clip_vision(path: Path) -> ClipVision:
    """An image encoder, its parameters mapped from the file.

    Args:
        path: a folder with `config.json`; a model's folder that has one as `image_encoder`; or a file under the names
            of transformers or of OpenCLIP, whatever else is in it.

    Raises:
        CheckpointError: there is none, or one that we do not have.
    """
    module = vision_of(path).build()
    assert isinstance(module, ClipVision)
    return module


def vision_of(path: Path) -> Piece:
    """The image encoder of a folder or file, not yet built; see `open_clip_vision`."""
    if path.is_dir():
        inside = path / PART
        return open_part(inside if (inside / "config.json").exists() else path, PART, VISION)
    file = open_weights(path)
    place = vision_place(file.tensors)
    if place is None:
        first = ", ".join(list(file.tensors)[:3])
        raise CheckpointError(f"{path} holds no image encoder: {len(file.tensors)} tensors, the first are {first}")
    return vision_piece(file, place)


def config_of_shapes(shapes: Shapes) -> ClipVisionConfig:
    """The shape of an image encoder from its header, under our names.

    Raises:
        CheckpointError: a tensor is missing or of an impossible shape.
    """
    width, _, _, patch = need(shapes, f"{OURS}{SIGN}", 4)
    positions = need(shapes, f"{OURS}embeddings.position_embedding.weight", 2)[0]
    side = isqrt(max(positions - 1, 0))
    if side * side + 1 != positions or not side or not patch:
        raise CheckpointError(f"an image encoder of {positions} positions; expected one more than a square number")
    return ClipVisionConfig(
        width=width,
        inner_width=need(shapes, f"{OURS}encoder.layers.0.mlp.fc1.weight", 2)[0],
        layers=count(shapes, f"{OURS}encoder.layers.{{}}.layer_norm1.weight"),
        heads=BASE[1] if width == BASE[0] else HEADS,
        image_size=side * patch,
        patch=patch,
        activation="quick_gelu" if width <= OPENAI_WIDTH else "gelu",
        projection_width=need(shapes, PROJECTION, 2)[0] if PROJECTION in shapes else 0,
    )


def _open_clip_config(shapes: Shapes) -> ClipVisionConfig:
    layers = count(shapes, "transformer.resblocks.{}.ln_1.weight")
    return config_of_shapes(shapes_from_file(_table(ClipVisionConfig(layers=layers)), shapes))


def _table(config: ClipVisionConfig) -> list[Pair]:
    """Every tensor in OpenCLIP's layout (`transformer.py: VisionTransformer`)."""
    outside = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": SIGN,
    }
    outside |= {
        f"{theirs}.{leaf}": f"{ours}.{leaf}"
        for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"))
        for leaf in ("weight", "bias")
    }
    table = [Pair(theirs, (f"{OURS}{ours}",)) for theirs, ours in outside.items()]
    if config.projection_width:
        table.append(Pair("proj", (PROJECTION,), "transposed"))
    for n in range(config.layers):
        table += open_clip_layer(f"transformer.resblocks.{n}", f"{OURS}encoder.layers.{n}")
    return table
