"""ControlNets in files: layouts, names, and configs from shapes and from JSON.

Three layouts: that of a diffusers folder (whose names are ours), the original one of lllyasviel/ControlNet for U-Nets
(`cldm.py`), and Stability's for 3.5 large. The part that a ControlNet copies from a U-Net has the names that the U-Net
has in the same layout, so that the families' tables serve.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from reverie.checkpoint.weightfile import shown
from reverie.errors import CheckpointError
from reverie.families import configs, ldm
from reverie.families import shapes as shapes_
from reverie.families.json_config import Json, JsonConfig
from reverie.families.pairs import Pair, from_file
from reverie.families.sd3 import configs as sd3
from reverie.families.shapes import Shapes, count, need
from reverie.nets.controlnet import UNION_WIDTHS, WIDTHS, ControlNetConfig, UnionConfig
from reverie.nets.controlnet_sd3 import SD3ControlNetConfig
from reverie.nets.mmdit import MMDiTConfig
from reverie.nets.unet import UNetConfig

T = TypeVar("T")

CLASS, UNION_CLASS, SD3_CLASS = "ControlNetModel", "ControlNetUnionModel", "SD3ControlNetModel"
PREFIXES = ("control_model.", "controlnet.", "")  # of lllyasviel's files, of some trainers', of most
OURS = "controlnet_cond_embedding.conv_in.weight"
ORIGINAL = "input_hint_block.0.weight"
SD3_SIGN, SD3_STABILITY = "pos_embed_input.proj.weight", "transformer_blocks.0.attn.qkv.weight"
UNION = "task_embedding"
LORA, DIFFERENCE, CONTROL_TYPE = "lora_controlnet", "difference", "control_type"
MARKS = (LORA, DIFFERENCE, CONTROL_TYPE)  # tensors that say what a file is
CANNY = 1  # `control_type` of Stability's; sd3-ref `sd3_infer.py`
HINT = "controlnet_cond_embedding"
# What a ControlNet's way up would be asked for by readers of whole U-Nets.
NO_WAY_UP = {"conv_out.weight": (4, 1, 1, 1)}
NO_WAY_UP_ORIGINAL = {"out.2.weight": (4, 1, 1, 1)}
# Keys of a U-Net's config that ControlNetModel has, too.
SHARED = {
    "act_fn", "addition_embed_type", "addition_time_embed_dim", "attention_head_dim", "block_out_channels",
    "class_embed_type", "cross_attention_dim", "down_block_types", "downsample_padding", "encoder_hid_dim",
    "encoder_hid_dim_type", "flip_sin_to_cos", "freq_shift", "in_channels", "layers_per_block",
    "mid_block_scale_factor", "mid_block_type", "norm_eps", "norm_num_groups", "num_attention_heads",
    "num_class_embeds", "only_cross_attention", "projection_class_embeddings_input_dim", "resnet_time_scale_shift",
    "transformer_layers_per_block", "use_linear_projection",
}  # fmt: skip
# In which networks and adapters that are no ControlNets for Stable Diffusion a part of a name occurs.
OTHERS = (
    ("lllite_", "a ControlNet-LLLite, which replaces attention layers of SDXL"),
    ("down_connections.", "a ControlNet-XS, which exchanges features with the U-Net in both directions"),
    ("brushnet_", "a BrushNet"),
    ("motion_modules.", "a motion module or SparseCtrl of AnimateDiff"),
    ("double_blocks.", "a network of FLUX"), ("single_transformer_blocks.", "a network of FLUX"),
    ("controlnet_x_embedder.", "a ControlNet for FLUX"),
    ("img_mlp.", "a network of Qwen-Image"), ("after_proj", "a ControlNet for Hunyuan-DiT or Qwen-Image"),
    ("lora_", "a LoRA"), (".lora", "a LoRA"), ("hada_", "a LoHa"), ("lokr_", "a LoKr"),
    ("ip_adapter.", "an IP-Adapter"), ("to_k_ip", "an IP-Adapter"),
    ("adapter.body.", "a T2I-Adapter"), ("body.0.", "a T2I-Adapter"),
    ("model.diffusion_model.", "a model, not something beside it"), ("conv_out.", "a U-Net or a VAE"),
    ("first_stage_model.", "a VAE"), ("decoder.", "a VAE"), ("text_model.", "a text encoder"),
)  # fmt: skip
PICTURE_BLOCK = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.proj": ("attn.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}  # of Stability's blocks without text, and ours


def without_prefix(names: Mapping[str, T]) -> dict[str, T]:
    """What a file holds of a ControlNet, by names without their prefix; what else is in it (a whole model in the files
    of 2023) is left out.
    """
    signs = (OURS, ORIGINAL, SD3_SIGN)
    prefix = next((p for p in PREFIXES if any(p + sign in names for sign in signs)), "")
    marks = {mark: names[mark] for mark in MARKS if mark in names}
    return marks | {name.removeprefix(prefix): t for name, t in names.items() if name.startswith(prefix)}


def what_else(names: Mapping[str, object]) -> str:
    """What a file is that is no ControlNet for Stable Diffusion, as far as its names show."""
    for part, what in OTHERS:
        sign = next((name for name in names if part in name), None)
        if sign is not None:
            return f"{what} (tensor {shown(sign)})"
    return f"something else, beginning with tensor {shown(next(iter(names)))}"


# For U-Nets


def hint_table(shapes: Mapping[str, object]) -> dict[str, str]:
    """Original -> ours, of what a ControlNet has beside its copy of the encoder."""
    places = (name.split(".")[1] for name in shapes if name.startswith("input_hint_block."))
    last = max((int(place) for place in places if place.isdecimal()), default=0)
    zeros = count(shapes, "zero_convs.{}.0.weight")
    return {
        "input_hint_block.0": f"{HINT}.conv_in",
        **{f"input_hint_block.{2 * (k + 1)}": f"{HINT}.blocks.{k}" for k in range(last // 2 - 1)},
        f"input_hint_block.{last}": f"{HINT}.conv_out",
        **{f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(zeros)},
        "middle_block_out.0": "controlnet_mid_block",
    }


def renamed(tensors: Mapping[str, T], table: Mapping[str, str]) -> dict[str, T]:
    """Tensors under our names; those that the table does not have keep theirs."""
    return {ldm.rename(name, table) or name: t for name, t in tensors.items()}


def original_table(shapes: Shapes) -> dict[str, str]:
    """Original -> ours, for a ControlNet of such shapes.

    Raises:
        CheckpointError: a tensor is missing or of an impossible shape.
    """
    config = ldm.unet_config({**shapes, **NO_WAY_UP_ORIGINAL})
    return ldm.inverse(ldm.unet_table(config)) | hint_table(shapes)


def control_config(shapes: Shapes, base: UNetConfig) -> ControlNetConfig:
    """The shape of a ControlNet from its header.

    Args:
        shapes: under our names.
        base: of the U-Net that it is to go with; what shapes do not show (heads, groups) is as there, if both have the
            same widths.

    Raises:
        CheckpointError: a tensor is missing or of an impossible shape.
    """
    reads = any(name.endswith("attn2.to_k.weight") for name in shapes)
    # Without attention no prompt is read, and that of any width will do.
    prompt = {} if reads else {"attn2.to_k.weight": (1, base.context_width)}
    found = shapes_.unet_config({**shapes, **NO_WAY_UP, **prompt})
    unet = replace(found, out_channels=base.out_channels, up_attention=None, size_width=base.size_width)
    if unet.block_out_channels == base.block_out_channels:
        unet = replace(unet, heads=base.heads, groups=base.groups)
    union = _union(shapes) if UNION in shapes else None
    if union is not None:
        told = need(shapes, "control_add_embedding.linear_1.weight", 2)[1]
        unet = replace(unet, size_width=told // max(union.kinds, 1))
    return ControlNetConfig(unet, need(shapes, OURS, 4)[1], hint_widths(shapes), union=union)


def hint_widths(shapes: Shapes) -> tuple[int, ...]:
    """The widths of the network that embeds the picture."""
    halvings = count(shapes, f"{HINT}.blocks.{{}}.weight") // 2
    widths = (need(shapes, f"{HINT}.blocks.{2 * i + 1}.weight", 4)[0] for i in range(halvings))
    return (need(shapes, OURS, 4)[0], *widths)


def _union(shapes: Shapes) -> UnionConfig:
    kinds, width = need(shapes, UNION, 2)
    return UnionConfig(kinds, width, layers=count(shapes, "transformer_layes.{}.ln_1.weight"))


def json_config(json: Json) -> ControlNetConfig:
    """From `config.json` of a ControlNetModel or ControlNetUnionModel; diffusers' defaults where a key is absent.

    Raises:
        CheckpointError: a feature that no published ControlNet has, or values that contradict one another.
    """
    c = JsonConfig(json, "config.json")
    union = json.get("_class_name") == UNION_CLASS
    down = json.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    up = [str(name).replace("Down", "Up") for name in reversed(down)] if isinstance(down, list) else down
    unet = {key: value for key, value in json.items() if key in SHARED}
    shape = configs.unet_config({**unet, "_class_name": "UNet2DConditionModel", "up_block_types": up})
    order = c.one_of("controlnet_conditioning_channel_order", "rgb", ("rgb", "bgr"))
    return ControlNetConfig(
        replace(shape, up_attention=None),
        c.count("conditioning_channels", 3),
        c.counts("conditioning_embedding_out_channels", UNION_WIDTHS if union else WIDTHS),
        bgr=order == "bgr",
        pooled=c.flag("global_pool_conditions"),
        union=_union_json(c) if union else None,
    )


def _union_json(c: JsonConfig) -> UnionConfig:
    return UnionConfig(
        c.count("num_control_type", 6), c.count("num_trans_channel", 320), c.few("num_trans_head", 8),
        c.few("num_trans_layer", 1),
    )  # fmt: skip


def to_json(config: ControlNetConfig) -> dict[str, Any]:
    """What diffusers' ControlNetModel or ControlNetUnionModel reads."""
    found = {key: value for key, value in configs.unet_json(config.unet).items() if key in SHARED}
    found |= {
        "_class_name": CLASS if config.union is None else UNION_CLASS,
        "conditioning_channels": config.channels,
        "conditioning_embedding_out_channels": list(config.widths),
        "controlnet_conditioning_channel_order": "bgr" if config.bgr else "rgb",
        "global_pool_conditions": config.pooled,
    }
    if config.union is not None:
        union = config.union
        found |= {
            "num_control_type": union.kinds, "num_trans_channel": union.width, "num_trans_head": union.heads,
            "num_trans_layer": union.layers, "num_proj_channel": config.unet.block_out_channels[0],
        }  # fmt: skip
        found.pop("mid_block_type", None)
    return found


# For the transformer of Stable Diffusion 3


def sd3_config(shapes: Shapes, base: MMDiTConfig) -> SD3ControlNetConfig:
    """The shape of a ControlNet of Stable Diffusion 3 from its header.

    Args:
        shapes: under our names.
        base: of the transformer that it is to go with, for what it takes over from there.

    Raises:
        CheckpointError: a tensor is missing or of an impossible shape.
    """
    width, channels, patch, _ = need(shapes, SD3_SIGN, 4)
    layers = count(shapes, "controlnet_blocks.{}.weight")
    own, joint = "pos_embed.proj.weight" in shapes, "context_embedder.weight" in shapes
    places = need(shapes, "pos_embed.pos_embed", 3)[1] if own else base.positions**2
    norm = "transformer_blocks.0.attn.norm_q.weight"
    head = need(shapes, norm, 1)[0] if norm in shapes else base.head_width
    latents = need(shapes, "pos_embed.proj.weight", 4)[1] if own else base.in_channels
    if not (layers and head and patch) or width % head or channels < latents or math.isqrt(places) ** 2 != places:
        raise CheckpointError(
            f"a ControlNet of {layers} blocks, {width} channels with heads of {head}, {places} positions and patches "
            f"of {patch} that is shown {channels} channels: no such network goes with Stable Diffusion 3"
        )
    shape = MMDiTConfig(
        in_channels=latents, out_channels=base.out_channels, patch_size=patch, layers=layers, heads=width // head,
        head_width=head, positions=math.isqrt(places), base_positions=base.base_positions, qk_norm=norm in shapes,
        context_width=need(shapes, "context_embedder.weight", 2)[1] if joint else base.context_width,
        vector_width=need(shapes, "time_text_embed.text_embedder.linear_1.weight", 2)[1],
        dual_attention=tuple(i for i in range(layers) if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes),
    )  # fmt: skip
    # Those of InstantX and Alimama were trained with zeros, Stability's were not: diffusers' configs of both.
    return SD3ControlNetConfig(shape, channels - latents, joint, own, zero_vector=joint)


def sd3_json_config(json: Json, base: MMDiTConfig) -> SD3ControlNetConfig:
    """From `config.json` of a SD3ControlNetModel; see `json_config`."""
    c = JsonConfig(json, "config.json")
    own, joint = c.flag("use_pos_embed", True), json.get("joint_attention_dim", 4096) is not None
    width = c.count("num_attention_heads", 18) * c.count("attention_head_dim", 64)
    borrowed = {} if own else {"pos_embed_max_size": base.positions}
    borrowed |= {} if joint else {"joint_attention_dim": base.context_width}
    said = {**json, **borrowed, "_class_name": sd3.TRANSFORMER_CLASS, "caption_projection_dim": width}
    extra = 0 if c.get("extra_conditioning_channels", 0) == 0 else c.count("extra_conditioning_channels", 0)
    zeros = c.flag("force_zeros_for_pooled_projection", True)
    return SD3ControlNetConfig(sd3.transformer_config(said), extra, joint, own, zeros)


def sd3_to_json(config: SD3ControlNetConfig) -> dict[str, Any]:
    """What diffusers' SD3ControlNetModel reads."""
    return sd3.transformer_json(config.transformer) | {
        "_class_name": SD3_CLASS,
        "extra_conditioning_channels": config.extra_channels,
        "force_zeros_for_pooled_projection": config.zero_vector,
        "joint_attention_dim": config.transformer.context_width if config.joint else None,
        "pos_embed_max_size": config.transformer.positions if config.own_positions else None,
        "use_pos_embed": config.own_positions,
    }


def stability_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of Stability's ControlNets for 3.5 large, under our names.

    Raises:
        CheckpointError: queries, keys and values that are no three equal parts.
    """
    return from_file(list(_stability_pairs(tensors)), tensors, "a ControlNet for Stable Diffusion 3.5")


def stability_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The same for shapes: queries, keys and values are a third each."""
    return {
        name: (shapes[pair.theirs][0] // len(pair.ours), *shapes[pair.theirs][1:])
        for pair in _stability_pairs(shapes)
        if shapes[pair.theirs]
        for name in pair.ours
    }


def _stability_pairs(names: Mapping[str, object]) -> Iterator[Pair]:
    for name in names:
        parts = name.split(".")
        module = ".".join(parts[2:-1])
        if parts[0] == "transformer_blocks" and module in PICTURE_BLOCK:
            block, leaf = ".".join(parts[:2]), parts[-1]
            yield Pair(name, tuple(f"{block}.{ours}.{leaf}" for ours in PICTURE_BLOCK[module]))
        else:
            yield Pair(name, (name,))
