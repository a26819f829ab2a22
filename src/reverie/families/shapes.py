"""The configs of networks from the shapes of their tensors, under our names.

What shapes cannot say (how many heads share the channels, which activation) is a rule with a source beside it.
"""

from collections.abc import Mapping
from typing import Protocol, TypeAlias

from reverie.errors import CheckpointError
from reverie.nets.autoencoder import AutoencoderConfig
from reverie.nets.clip_text import ClipTextConfig
from reverie.nets.unet import UNetConfig, VectorKind

HEADS = 8  # of SD 1 and of the x4 upscaler: CompVis v1-inference.yaml, Stability x4-upscaling.yaml `num_heads`
HEAD_WIDTH = 64  # of SD 2 and SDXL: Stability v2-inference.yaml `num_head_channels`; of every published CLIP
GROUPS = 32  # of every norm: CompVis `Normalize`, `normalization`
MOST_LAYERS = 200  # far above every published model


class Shaped(Protocol):
    """What an entry of a header and a tensor have in common."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the dimensions."""


Header: TypeAlias = Mapping[str, Shaped]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


def shapes_of(header: Header, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors under a prefix, by their names without it."""
    return {name.removeprefix(prefix): tuple(t.shape) for name, t in header.items() if name.startswith(prefix)}


def need(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with so many dimensions.

    Raises:
        CheckpointError: it is not.
    """
    if name not in shapes or len(shapes[name]) != dimensions:
        found = f"has shape {list(shapes[name])}" if name in shapes else "is missing"
        raise CheckpointError(f"tensor {name} {found}; expected {dimensions} dimensions")
    return shapes[name]


def count(shapes: Mapping[str, object], name: str, first: int = 0) -> int:
    """How many there are of a numbered name, without a gap: `down_blocks.{}.resnets.0.conv1.weight`.

    Counting ends beyond `MOST_LAYERS`.

    Args:
        first: the number of the first.
    """
    return next(n for n in range(MOST_LAYERS + 2) if n > MOST_LAYERS or name.format(first + n) not in shapes)


def _refuse_empty(shapes: Shapes) -> None:
    for name, shape in shapes.items():
        if 0 in shape:
            raise CheckpointError(f"tensor {name} of shape {list(shape)} is empty")


def unet_config(shapes: Shapes) -> UNetConfig:
    """The shape of a U-Net.

    Raises:
        CheckpointError: a tensor is missing or of an impossible shape, or there is no attention to a prompt.
    """
    _refuse_empty(shapes)
    levels = count(shapes, "down_blocks.{}.resnets.0.conv1.weight")
    layers = count(shapes, "down_blocks.0.resnets.{}.conv1.weight")
    key = next((name for name in shapes if name.endswith("attn2.to_k.weight")), None)
    if not levels or key is None:
        raise CheckpointError("the U-Net has no cross-attention to a prompt; this is no text-to-image U-Net")
    widths = tuple(need(shapes, f"down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in range(levels))
    linear = len(shapes.get(key.split("transformer_blocks")[0] + "proj_in.weight", ())) == 2
    down = tuple(_depths(shapes, f"down_blocks.{i}", layers) for i in range(levels))
    up = tuple(_depths(shapes, f"up_blocks.{i}", layers + 1) for i in range(levels))
    vector, vector_width = _vector(shapes)
    told = "time_embedding.cond_proj.weight"
    by_width = linear and vector != "class_table"
    return UNetConfig(
        in_channels=need(shapes, "conv_in.weight", 4)[1],
        out_channels=need(shapes, "conv_out.weight", 4)[0],
        block_out_channels=widths,
        attention=down,
        heads=tuple(max(width // HEAD_WIDTH, 1) if by_width else HEADS for width in widths),
        layers_per_block=layers,
        context_width=need(shapes, key, 2)[1],
        groups=GROUPS,
        linear_projection=linear,
        up_attention=None if up == down[::-1] else up,
        mid_attention=_middle(shapes),
        cross_only=_cross_only(shapes, widths),
        vector=vector,
        vector_width=vector_width,
        guidance_width=need(shapes, told, 2)[1] if told in shapes else 0,
    )


def _depths(shapes: Shapes, block: str, layers: int) -> int | tuple[int, ...]:
    """Depth of the transformers of a level: one number where they are all the same."""
    depths = tuple(_depth(shapes, f"{block}.attentions.{j}") for j in range(layers))
    return depths[0] if len(set(depths)) == 1 else depths


def _depth(shapes: Shapes, transformer: str) -> int:
    return count(shapes, f"{transformer}.transformer_blocks.{{}}.norm1.weight")


def _middle(shapes: Shapes) -> int | None:
    return _depth(shapes, "mid_block.attentions.0") if "mid_block.resnets.0.conv1.weight" in shapes else None


def _cross_only(shapes: Shapes, widths: tuple[int, ...]) -> tuple[bool, ...]:
    """Where the first attention's keys are not as wide as the level: then they come from the prompt."""
    key = "down_blocks.{}.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    found = tuple(shapes.get(key.format(i), (0, width))[-1] != width for i, width in enumerate(widths))
    return found if any(found) else ()


def _vector(shapes: Shapes) -> tuple[VectorKind, int]:
    if "add_embedding.linear_1.weight" in shapes:
        return "add_embedding", need(shapes, "add_embedding.linear_1.weight", 2)[1]
    if "class_embedding.linear_1.weight" in shapes:
        return "class_embedding", need(shapes, "class_embedding.linear_1.weight", 2)[1]
    if "class_embedding.weight" in shapes:
        return "class_table", need(shapes, "class_embedding.weight", 2)[0]
    return "", 0


def vae_config(shapes: Shapes) -> AutoencoderConfig:
    """The shape of an autoencoder; its scale is that of its family.

    Raises:
        CheckpointError: a tensor is missing or of an impossible shape.
    """
    _refuse_empty(shapes)
    levels = count(shapes, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    return AutoencoderConfig(
        in_channels=need(shapes, "encoder.conv_in.weight", 4)[1],
        latent_channels=need(shapes, "decoder.conv_in.weight", 4)[1],
        block_out_channels=tuple(
            need(shapes, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in range(levels)
        ),
        layers_per_block=count(shapes, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        groups=GROUPS,
        quant_conv="quant_conv.weight" in shapes,
        post_quant_conv="post_quant_conv.weight" in shapes,
    )


def clip_config(shapes: Shapes, activation: str) -> ClipTextConfig:
    """The shape of a CLIP text encoder.

    Args:
        activation: `quick_gelu` or `gelu`, which shapes do not show.

    Raises:
        CheckpointError: a tensor is missing or of an impossible shape.
    """
    _refuse_empty(shapes)
    vocab_size, width = need(shapes, "text_model.embeddings.token_embedding.weight", 2)
    projection = "text_projection.weight"
    return ClipTextConfig(
        vocab_size=vocab_size,
        width=width,
        inner_width=need(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        layers=count(shapes, "text_model.encoder.layers.{}.layer_norm1.weight"),
        heads=max(width // HEAD_WIDTH, 1),
        positions=need(shapes, "text_model.embeddings.position_embedding.weight", 2)[0],
        activation=activation,
        projection_width=need(shapes, projection, 2)[0] if projection in shapes else 0,
    )
