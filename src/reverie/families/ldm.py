"""Between the original (LDM) single-file layout and our names, both ways, for every family that has a U-Net.

A table pairs module paths; what stands below a paired path (`.weight`, `.transformer_blocks.0...`) is equal in both.
Derived from CompVis `openaimodel.py` and `model.py`, which number their blocks in the order they run, and from
OpenCLIP's `transformer.py`. The shape of a network is read from the file's header by renaming it first.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from reverie.errors import CheckpointError
from reverie.families import shapes as shapes_
from reverie.families.json_config import LEVELS
from reverie.families.pairs import Pair, Tensors, from_file, refuse_strangers, shapes_from_file, to_file
from reverie.families.shapes import Shapes, count, need
from reverie.nets.autoencoder import AutoencoderConfig
from reverie.nets.clip_text import ClipTextConfig
from reverie.nets.unet import UNetConfig, VectorKind

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
VAES = (VAE, "vae.")  # ComfyUI writes the second, too

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
RESBLOCK = "transformer.resblocks.{}.ln_1.weight"  # of each layer of an OpenCLIP text encoder

Table = dict[str, str]
Pairs = Iterator[tuple[str, str]]


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """The name in the other layout: the longest known path is replaced. None if no path is known."""
    path = name
    while path:
        if path in table:
            return table[path] + name[len(path) :]
        path = path.rpartition(".")[0]
    return None


def inverse(table: Mapping[str, str]) -> Table:
    """The table read the other way."""
    return {theirs: ours for ours, theirs in table.items()}


def _renamed(tensors: Tensors, table: Mapping[str, str], what: str) -> dict[str, Tensor]:
    found = {name: rename(name, table) for name in tensors}
    refuse_strangers(tensors, (name for name, other in found.items() if other is not None), what)
    return {other: tensors[name] for name, other in found.items() if other is not None}


def _known(shapes: Shapes, table: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The shapes whose names the table knows, under their other names."""
    renamed = ((rename(name, table), shape) for name, shape in shapes.items())
    return {name: shape for name, shape in renamed if name is not None}


def _inside(ours: str, theirs: str, parts: Mapping[str, str]) -> Pairs:
    for a, b in parts.items():
        yield f"{ours}.{a}", f"{theirs}.{b}"


# The U-Net


@dataclass(frozen=True)
class _Frame:
    """What decides the names of a U-Net's blocks.

    Attributes:
        levels, layers: resolutions, and residual blocks of each on the way down.
        attended: of each up block as they run, whether a transformer stands before its upsampler.
        vector: as in `UNetConfig`.
    """

    levels: int
    layers: int
    attended: tuple[bool, ...]
    vector: VectorKind


def unet_table(config: UNetConfig) -> Table:
    """Ours -> LDM, without the prefix."""
    levels = len(config.block_out_channels)
    attended = tuple(config.up_depths(level)[-1] > 0 for level in reversed(range(levels)))
    return dict(_unet_pairs(_Frame(levels, config.layers_per_block, attended, config.vector)))


def unet_config(shapes: Shapes, vector: VectorKind = "add_embedding") -> UNetConfig:
    """The shape of a U-Net from its header.

    Args:
        shapes: by their names in the file, without the prefix.
        vector: what `label_emb.0` is: `class_embedding` in Stable Diffusion 2 (unCLIP), else `add_embedding`.

    Raises:
        CheckpointError: a tensor is missing or of an impossible shape, or there is no attention to a prompt.
    """
    for name in ("input_blocks.0.0.weight", "out.2.weight"):  # named here as the file has them
        need(shapes, name, 4)
    return shapes_.unet_config(_known(shapes, inverse(dict(_unet_pairs(_frame(shapes, vector))))))


def unet_from_file(tensors: Tensors, config: UNetConfig) -> dict[str, Tensor]:
    """The U-Net's tensors under our names.

    Raises:
        CheckpointError: a tensor that such a U-Net does not have.
    """
    return _renamed(tensors, inverse(unet_table(config)), "such a U-Net")


def unet_to_file(tensors: Tensors, config: UNetConfig) -> dict[str, Tensor]:
    """The U-Net's tensors under their names in the file, without the prefix.

    Raises:
        CheckpointError: a tensor that such a U-Net does not have.
    """
    return _renamed(tensors, unet_table(config), "such a U-Net")


def _frame(shapes: Shapes, vector: VectorKind) -> _Frame:
    levels = 1 + sum(name.startswith("input_blocks.") and name.endswith(".0.op.weight") for name in shapes)
    if levels > LEVELS:
        raise CheckpointError(f"a U-Net of {levels} resolutions; expected at most {LEVELS}")
    layers = count(shapes, "input_blocks.{}.0.in_layers.2.weight", first=1)
    last = (f"output_blocks.{i * (layers + 1) + layers}.2.conv.weight" for i in range(levels))
    kind: VectorKind = vector if "label_emb.0.0.weight" in shapes else ""
    return _Frame(
        levels, layers, tuple(name in shapes for name in last), "class_table" if "label_emb.weight" in shapes else kind
    )


def _unet_pairs(frame: _Frame) -> Pairs:
    layers = frame.layers
    yield "conv_in", "input_blocks.0.0"
    yield "time_embedding.linear_1", "time_embed.0"
    yield "time_embedding.linear_2", "time_embed.2"
    yield from _vector_pairs(frame.vector)
    for i in range(frame.levels):
        for j in range(layers):
            yield from _stage(f"down_blocks.{i}", f"input_blocks.{1 + i * (layers + 1) + j}", j)
        yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{(i + 1) * (layers + 1)}.0.op"
    yield from _inside("mid_block.resnets.0", "middle_block.0", RESNET)
    yield "mid_block.attentions.0", "middle_block.1"
    yield from _inside("mid_block.resnets.1", "middle_block.2", RESNET)
    for i in range(frame.levels):
        for j in range(layers + 1):
            yield from _stage(f"up_blocks.{i}", f"output_blocks.{i * (layers + 1) + j}", j)
        place = 2 if frame.attended[i] else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{i * (layers + 1) + layers}.{place}.conv"
    yield "conv_norm_out", "out.0"
    yield "conv_out", "out.2"


def _vector_pairs(vector: VectorKind) -> Pairs:
    if vector == "class_table":
        yield "class_embedding", "label_emb"
    elif vector:
        yield f"{vector}.linear_1", "label_emb.0.0"
        yield f"{vector}.linear_2", "label_emb.0.2"


def _stage(ours: str, theirs: str, j: int) -> Pairs:
    yield from _inside(f"{ours}.resnets.{j}", f"{theirs}.0", RESNET)
    yield f"{ours}.attentions.{j}", f"{theirs}.1"


# The autoencoder


def vae_table(config: AutoencoderConfig) -> Table:
    """Ours -> LDM, without the prefix."""
    return dict(_vae_pairs(len(config.block_out_channels), config.layers_per_block))


def vae_config(shapes: Shapes) -> AutoencoderConfig:
    """The shape of an autoencoder from its header.

    Args:
        shapes: by their names in the file, without the prefix.

    Raises:
        CheckpointError: a tensor is missing or of an impossible shape.
    """
    levels = count(shapes, "encoder.down.{}.block.0.conv1.weight")
    layers = count(shapes, "encoder.down.0.block.{}.conv1.weight")
    return shapes_.vae_config(_known(shapes, inverse(dict(_vae_pairs(levels, layers)))))


def vae_from_file(tensors: Tensors, config: AutoencoderConfig) -> dict[str, Tensor]:
    """The VAE's tensors under our names. LDM writes its attention as 1x1 convolutions; ours is linear: a view.

    Raises:
        CheckpointError: a tensor that such a VAE does not have.
    """
    found = _renamed(tensors, inverse(vae_table(config)), "such a VAE")
    return {name: t.flatten(1) if ".attentions." in name and t.ndim == 4 else t for name, t in found.items()}


def vae_to_file(tensors: Tensors, config: AutoencoderConfig) -> dict[str, Tensor]:
    """The VAE's tensors under their names in the file, without the prefix.

    Raises:
        CheckpointError: a tensor that such a VAE does not have.
    """
    shaped = {n: t[:, :, None, None] if ".attentions." in n and t.ndim == 2 else t for n, t in tensors.items()}
    return _renamed(shaped, vae_table(config), "such a VAE")


def _vae_pairs(levels: int, layers: int) -> Pairs:
    for name in ("quant_conv", "post_quant_conv"):
        yield name, name
    for side in ("encoder", "decoder"):
        for name in ("conv_in", "conv_out"):
            yield f"{side}.{name}", f"{side}.{name}"
        yield f"{side}.conv_norm_out", f"{side}.norm_out"
        for k in (0, 1):
            yield from _inside(f"{side}.mid_block.resnets.{k}", f"{side}.mid.block_{k + 1}", VAE_RESNET)
        yield from _inside(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", VAE_ATTENTION)
    for i in range(levels):
        for j in range(layers):
            yield from _inside(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}", VAE_RESNET)
        yield f"encoder.down_blocks.{i}.downsamplers.0.conv", f"encoder.down.{i}.downsample.conv"
        up = levels - 1 - i  # LDM numbers the decoder's levels from the picture, diffusers from the latents
        for j in range(layers + 1):
            yield from _inside(f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{up}.block.{j}", VAE_RESNET)
        yield f"decoder.up_blocks.{i}.upsamplers.0.conv", f"decoder.up.{up}.upsample.conv"


# The text encoder of OpenCLIP


def open_clip_layer(theirs: str, ours: str) -> list[Pair]:
    """Every tensor of one layer of a transformer in OpenCLIP's layout, which is openai/CLIP's.

    Args:
        theirs, ours: the paths of the layer.
    """
    table = []
    for leaf in ("weight", "bias"):
        own = tuple(f"{ours}.self_attn.{part}_proj.{leaf}" for part in "qkv")
        table.append(Pair(f"{theirs}.attn.in_proj_{leaf}", own))
        table += [Pair(f"{theirs}.{b}.{leaf}", (f"{ours}.{a}.{leaf}",)) for a, b in LAYER.items()]
    return table


def open_clip_table(config: ClipTextConfig) -> list[Pair]:
    """Every tensor of a text encoder, once."""
    outside = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    }
    table = [Pair(theirs, (f"text_model.{ours}",)) for theirs, ours in outside.items()]
    if config.projection_width:
        table.append(Pair("text_projection", ("text_projection.weight",), "transposed"))
    for n in range(config.layers):
        table += open_clip_layer(f"transformer.resblocks.{n}", f"text_model.encoder.layers.{n}")
    return table


def open_clip_config(shapes: Shapes) -> ClipTextConfig:
    """The shape of a text encoder from its header.

    Args:
        shapes: by their names in the file, without the prefix.

    Raises:
        CheckpointError: a tensor is missing or of an impossible shape.
    """
    bare = ClipTextConfig(layers=count(shapes, RESBLOCK), projection_width=1)
    return shapes_.clip_config(shapes_from_file(open_clip_table(bare), shapes), "gelu")


def open_clip_from_file(tensors: Tensors, config: ClipTextConfig) -> dict[str, Tensor]:
    """The text encoder's tensors under our names, all of them views.

    Raises:
        CheckpointError: a tensor that such a text encoder does not have, or of an impossible shape.
    """
    return from_file(open_clip_table(config), tensors, "such a text encoder")


def open_clip_to_file(tensors: Tensors, config: ClipTextConfig) -> dict[str, Tensor]:
    """The text encoder's tensors under their names in the file, without the prefix.

    Raises:
        CheckpointError: a tensor too many or too few.
    """
    return to_file(open_clip_table(config), tensors, "such a text encoder")
