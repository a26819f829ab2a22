"""Between the original single-file layout of Stable Diffusion 3 and our names, both ways.

A file holds up to five networks, each under a prefix. The text encoders' names below it are already those of
transformers. The transformer's modules are paired here from Stability's sd3-ref `mmdit.py`; three things differ beyond
names: queries, keys and values are one tensor there; where only a shift and a scale come from the conditioning, the
shift is first there, the scale here; and the VAE's attention is made of 1x1 convolutions there, linear here.
"""

import math
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from reverie.errors import CheckpointError
from reverie.families.ldm import vae_from_file, vae_to_file
from reverie.families.pairs import Pair, Tensors, from_file, refuse_strangers, to_file
from reverie.families.shapes import HEAD_WIDTH, MOST_LAYERS, Header, Shapes, count, need, shapes_of
from reverie.nets.autoencoder import AutoencoderConfig
from reverie.nets.mmdit import MMDiTConfig
from reverie.nets.t5 import T5Config

T = TypeVar("T")

# The parts by the names of their folders, and where they are in a file.
TRANSFORMER, VAE, CLIP_L, T5 = "transformer", "vae", "text_encoder", "text_encoder_3"
PREFIXES: dict[str, str] = {
    TRANSFORMER: "model.diffusion_model.",
    VAE: "first_stage_model.",
    CLIP_L: "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    T5: "text_encoders.t5xxl.transformer.",
}
# What training left in files and no picture needs.
IGNORED = (".logit_scale", ".embeddings.position_ids")

TITLE = "Stable Diffusion 3"
BOTH, WEIGHT = ("weight", "bias"), ("weight",)
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
Modules = Mapping[str, tuple[str, ...]]
# Inside a block: the original module, and ours (three where it is queries, keys and values in one).
PICTURE: Modules = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.proj": ("attn.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
PICTURE_NORMS: Modules = {"attn.ln_q": ("attn.norm_q",), "attn.ln_k": ("attn.norm_k",)}
SECOND: Modules = {"attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "attn2.proj": ("attn2.to_out.0",)}
SECOND_NORMS: Modules = {"attn2.ln_q": ("attn2.norm_q",), "attn2.ln_k": ("attn2.norm_k",)}
TEXT: Modules = {
    "adaLN_modulation.1": ("norm1_context.linear",),
    "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
TEXT_NORMS: Modules = {"attn.ln_q": ("attn.norm_added_q",), "attn.ln_k": ("attn.norm_added_k",)}
TEXT_OUT: Modules = {  # not in the last block
    "attn.proj": ("attn.to_add_out",),
    "mlp.fc1": ("ff_context.net.0.proj",),
    "mlp.fc2": ("ff_context.net.2",),
}


def transformer_table(config: MMDiTConfig) -> list[Pair]:
    """Every tensor of the transformer, once."""
    return [Pair("pos_embed", ("pos_embed.pos_embed",)), *_outside(), *_blocks(config)]


def _outside() -> Iterator[Pair]:
    for theirs, ours in OUTSIDE.items():
        for leaf in BOTH:
            yield Pair(f"{theirs}.{leaf}", (f"{ours}.{leaf}",), "swapped" if ours == "norm_out.linear" else "")


def _blocks(config: MMDiTConfig) -> Iterator[Pair]:
    for i in range(config.layers):
        last = i == config.layers - 1
        for stream, table, leaves in _streams(config, i):
            for theirs, ours in table.items():
                for leaf in leaves:
                    swapped = last and table is TEXT and theirs == "adaLN_modulation.1"
                    yield Pair(
                        f"joint_blocks.{i}.{stream}.{theirs}.{leaf}",
                        tuple(f"transformer_blocks.{i}.{name}.{leaf}" for name in ours),
                        "swapped" if swapped else "",
                    )


def _streams(config: MMDiTConfig, index: int) -> Iterator[tuple[str, Modules, tuple[str, ...]]]:
    """The tables that a block has, the stream that they are of, and what each module holds."""
    norms, second = config.qk_norm, index in config.dual_attention
    yield "x_block", PICTURE, BOTH
    yield "context_block", TEXT, BOTH
    if second:
        yield "x_block", SECOND, BOTH
    if index < config.layers - 1:
        yield "context_block", TEXT_OUT, BOTH
    if norms:
        yield "x_block", PICTURE_NORMS, WEIGHT
        yield "context_block", TEXT_NORMS, WEIGHT
    if norms and second:
        yield "x_block", SECOND_NORMS, WEIGHT


def transformer_from_file(tensors: Tensors, config: MMDiTConfig) -> dict[str, Tensor]:
    """The transformer's tensors under our names; no copy but of the four swapped ones. Missing ones stay missing.

    Args:
        tensors: by their names in the file, without the prefix.

    Raises:
        CheckpointError: a tensor that such a transformer does not have.
    """
    return from_file(transformer_table(config), tensors, TITLE)


def transformer_to_file(tensors: Tensors, config: MMDiTConfig) -> dict[str, Tensor]:
    """The transformer's tensors under their names in the file, without the prefix.

    Raises:
        CheckpointError: a tensor too many or too few.
    """
    return to_file(transformer_table(config), tensors, TITLE)


def t5_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """T5's tensors with its table of tokens once: `encoder.embed_tokens.weight` is another name of `shared.weight`."""
    found = dict(tensors)
    again = found.pop("encoder.embed_tokens.weight", None)
    return {"shared.weight": again} | found if again is not None else found


def clip_l_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """CLIP-L's tensors with the identity for `text_projection`, whatever the file says.

    Stable Diffusion 3 takes that encoder's pooled output before its projection (sd3-ref
    `return_projected_pooled=False`; diffusers does the same).
    """
    found = dict(tensors)
    norm = found.get("text_model.final_layer_norm.weight")
    if norm is not None:
        found["text_projection.weight"] = torch.eye(len(norm)).to(norm.dtype)
    return found


def split(tensors: Tensors, transformer: MMDiTConfig, vae: AutoencoderConfig) -> dict[str, dict[str, Tensor]]:
    """The parts of a file, by the names of their folders, each with its tensors under our names: what `join` joins.

    Args:
        tensors: the whole file by its own names. A file with the transformer alone may lack the prefix.

    Raises:
        CheckpointError: a tensor of no part.
    """
    found = by_part(tensors)
    if TRANSFORMER in found:
        found[TRANSFORMER] = transformer_from_file(found[TRANSFORMER], transformer)
    if VAE in found:
        found[VAE] = vae_from_file(found[VAE], vae)
    if T5 in found:
        found[T5] = t5_tensors(found[T5])
    if CLIP_L in found:
        found[CLIP_L] = clip_l_tensors(found[CLIP_L])
    return found


def join(parts: Mapping[str, Tensors], transformer: MMDiTConfig, vae: AutoencoderConfig) -> dict[str, Tensor]:
    """One file of parts, any of them: what `split` takes apart.

    Raises:
        CheckpointError: a part that such files do not have, or a tensor that a part does not have.
    """
    refuse_strangers(parts, PREFIXES, TITLE, "part")
    theirs = dict(parts)
    if TRANSFORMER in parts:
        theirs[TRANSFORMER] = transformer_to_file(parts[TRANSFORMER], transformer)
    if VAE in parts:
        theirs[VAE] = vae_to_file(parts[VAE], vae)
    return {PREFIXES[part] + name: t for part, tensors in theirs.items() for name, t in tensors.items()}


def config_from_header(header: Header) -> MMDiTConfig:
    """The transformer's shape from its tensors' shapes.

    Args:
        header: of the whole file, or of one with the transformer alone, with or without its prefix.

    Raises:
        CheckpointError: a tensor is missing or of an impossible shape.
    """
    shape = shapes_of(header, _prefix(header))
    width, in_channels, patch, _ = need(shape, "x_embedder.proj.weight", 4)
    _, places, _ = need(shape, "pos_embed", 3)
    layers = _count(shape, "joint_blocks.{}.x_block.attn.qkv.weight")
    dual = tuple(i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shape)
    qk_norm = "joint_blocks.0.x_block.attn.ln_q.weight" in shape
    (head,) = need(shape, "joint_blocks.0.x_block.attn.ln_q.weight", 1) if qk_norm else (HEAD_WIDTH,)
    side = math.isqrt(places)
    if not (width and head and patch) or width % head or side * side != places:
        raise CheckpointError(
            f"a transformer of width {width} with heads of {head}, {places} positions and patches of {patch}: "
            "expected whole heads and a square of positions, as in Stable Diffusion 3"
        )
    return MMDiTConfig(
        in_channels=in_channels,
        out_channels=need(shape, "final_layer.linear.weight", 2)[0] // patch**2,
        patch_size=patch,
        layers=layers,
        heads=width // head,
        head_width=head,
        context_width=need(shape, "context_embedder.weight", 2)[1],
        vector_width=need(shape, "y_embedder.mlp.0.weight", 2)[1],
        positions=side,
        qk_norm=qk_norm,
        dual_attention=dual,
    )


def t5_config_from_header(header: Header, prefix: str = PREFIXES[T5]) -> T5Config:
    """T5's shape from its tensors' shapes.

    Args:
        prefix: what stands before its names; empty for a file with T5 alone.

    Raises:
        CheckpointError: a tensor is missing or of an impossible shape.
    """
    shape = shapes_of(header, prefix)
    table = "shared.weight" if "shared.weight" in shape else "encoder.embed_tokens.weight"
    vocab_size, width = need(shape, table, 2)
    first = "encoder.block.0.layer"
    buckets, heads = need(shape, f"{first}.0.SelfAttention.relative_attention_bias.weight", 2)
    inner = need(shape, f"{first}.0.SelfAttention.q.weight", 2)[0]
    if not heads or inner % heads:
        raise CheckpointError(f"T5 has queries of {inner} channels for {heads} heads; expected whole heads")
    return T5Config(
        vocab_size=vocab_size,
        width=width,
        inner_width=need(shape, f"{first}.1.DenseReluDense.wi_0.weight", 2)[0],
        layers=_count(shape, "encoder.block.{}.layer.0.layer_norm.weight"),
        heads=heads,
        head_width=inner // heads,
        buckets=buckets,
    )


def by_part(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """What a file holds of each part, by names without their prefixes; leftovers of training are left out.

    Raises:
        CheckpointError: a tensor of no part.
    """
    prefixes = PREFIXES | ({TRANSFORMER: ""} if not _prefix(tensors) else {})
    found: dict[str, dict[str, T]] = {}
    for name, t in tensors.items():
        if name.endswith(IGNORED):
            continue
        # The empty prefix fits every name, so the longest that fits is the part's.
        part = max((p for p in prefixes if name.startswith(prefixes[p])), key=lambda p: len(prefixes[p]), default=None)
        if part is None:
            raise CheckpointError(f"tensor {name} is of no part of Stable Diffusion 3")
        found.setdefault(part, {})[name.removeprefix(prefixes[part])] = t
    return found


def _prefix(header: Mapping[str, object]) -> str:
    """What stands before the transformer's names: nothing in some files that hold nothing else."""
    return "" if "joint_blocks.0.x_block.attn.qkv.weight" in header else PREFIXES[TRANSFORMER]


def _count(shapes: Shapes, name: str) -> int:
    """How many layers there are, from the first without a gap."""
    layers = count(shapes, name)
    if not 0 < layers <= MOST_LAYERS:
        raise CheckpointError(f"{layers or 'no'} layers named {name.format(0)}; expected 1 to {MOST_LAYERS}")
    return layers
