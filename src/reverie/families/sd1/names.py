"""The renaming table between the original (LDM) single-file layout and our names, both ways.

A table pairs module paths; what stands below a paired path (`.weight`, `.transformer_blocks.0...`) is equal in both.
Derived from CompVis `openaimodel.py` and `model.py`, which number their blocks in the order they run.
"""

from collections.abc import Iterator, Mapping

from reverie.nets.autoencoder import AutoencoderConfig
from reverie.nets.unet import UNetConfig

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

Table = dict[str, str]
Pairs = Iterator[tuple[str, str]]


def unet_table(config: UNetConfig) -> Table:
    """Ours -> LDM, without the prefix."""
    return dict(_unet_pairs(config))


def vae_table(config: AutoencoderConfig) -> Table:
    """Ours -> LDM, without the prefix."""
    return dict(_vae_pairs(len(config.block_out_channels), config.layers_per_block))


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


def _inside(ours: str, theirs: str, parts: Mapping[str, str]) -> Pairs:
    for a, b in parts.items():
        yield f"{ours}.{a}", f"{theirs}.{b}"


def _unet_pairs(config: UNetConfig) -> Pairs:
    levels, layers = len(config.block_out_channels), config.layers_per_block
    yield "conv_in", "input_blocks.0.0"
    yield "time_embedding.linear_1", "time_embed.0"
    yield "time_embedding.linear_2", "time_embed.2"
    for i in range(levels):
        for j in range(layers):
            yield from _stage(f"down_blocks.{i}", f"input_blocks.{1 + i * (layers + 1) + j}", j)
        yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{(i + 1) * (layers + 1)}.0.op"
    yield from _inside("mid_block.resnets.0", "middle_block.0", RESNET)
    yield "mid_block.attentions.0", "middle_block.1"
    yield from _inside("mid_block.resnets.1", "middle_block.2", RESNET)
    for i in range(levels):
        for j in range(layers + 1):
            yield from _stage(f"up_blocks.{i}", f"output_blocks.{i * (layers + 1) + j}", j)
        place = 2 if config.attention[levels - 1 - i] else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{i * (layers + 1) + layers}.{place}.conv"
    yield "conv_norm_out", "out.0"
    yield "conv_out", "out.2"


def _stage(ours: str, theirs: str, j: int) -> Pairs:
    yield from _inside(f"{ours}.resnets.{j}", f"{theirs}.0", RESNET)
    yield f"{ours}.attentions.{j}", f"{theirs}.1"


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
