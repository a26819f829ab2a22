"""The configs of a diffusers folder, both ways.

Only what changes the network is read. A value that would need a network we do not have is an error, not ignored.
"""

import math
from collections.abc import Mapping
from typing import Any

from reverie.errors import CheckpointError
from reverie.nets.autoencoder import AutoencoderConfig
from reverie.nets.clip_text import ClipTextConfig
from reverie.nets.unet import UNetConfig

Json = Mapping[str, Any]
MOST = 1_000_000  # of anything that is counted: far above every published model, far below a build that never ends
LEVELS, LAYERS = 16, 200
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def unet_config(json: Json) -> UNetConfig:
    """From `unet/config.json` (class UNet2DConditionModel); diffusers' own defaults where a key is absent.

    Raises:
        CheckpointError: a feature that Stable Diffusion 1 does not have.
    """
    default_down = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    blocks = _names(json, "down_block_types", default_down)
    ups = _names(json, "up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    _require(
        json,
        "unet",
        act_fn="silu",
        norm_eps=1e-5,
        mid_block_scale_factor=1,
        freq_shift=0,
        flip_sin_to_cos=True,
    )
    _require(json, "unet", only_cross_attention=False, dual_cross_attention=False, class_embed_type=None)
    _require(json, "unet", addition_embed_type=None, resnet_time_scale_shift="default", time_cond_proj_dim=None)
    _require(
        json,
        "unet",
        transformer_layers_per_block=1,
        num_class_embeds=None,
        conv_in_kernel=3,
        conv_out_kernel=3,
    )
    _require(json, "unet", mid_block_type="UNetMidBlock2DCrossAttn", time_embedding_type="positional")
    attention = tuple(_one_of(block, DOWN, "down_block_types") for block in blocks)
    if tuple(_one_of(block, UP, "up_block_types") for block in ups) != attention[::-1]:
        raise CheckpointError(f"unet/config.json: up_block_types {ups} do not mirror down_block_types {blocks}")
    widths = _counts(json, "block_out_channels", (320, 640, 1280, 1280))
    # diffusers calls the number of heads `attention_head_dim` for this family (its issue 2011).
    key = "num_attention_heads" if json.get("num_attention_heads") else "attention_head_dim"
    heads = _counts(json, key, (8,)) if isinstance(json.get(key), list) else (_count(json, key, 8),) * len(widths)
    return UNetConfig(
        in_channels=_count(json, "in_channels", 4),
        out_channels=_count(json, "out_channels", 4),
        block_out_channels=widths,
        attention=attention,
        heads=heads,
        layers_per_block=_few(json, "layers_per_block", 2),
        context_width=_count(json, "cross_attention_dim", 1280),
        groups=_count(json, "norm_num_groups", 32),
        linear_projection=bool(json.get("use_linear_projection", False)),
    )


def unet_json(config: UNetConfig) -> dict[str, Any]:
    """What diffusers' UNet2DConditionModel reads."""
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": config.heads[0] if len(set(config.heads)) == 1 else list(config.heads),
        "block_out_channels": list(config.block_out_channels),
        "center_input_sample": False,
        "cross_attention_dim": config.context_width,
        "down_block_types": [DOWN[has] for has in config.attention],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": config.groups,
        "out_channels": config.out_channels,
        "up_block_types": [UP[has] for has in reversed(config.attention)],
        "use_linear_projection": config.linear_projection,
    }


def vae_config(json: Json) -> AutoencoderConfig:
    """From `vae/config.json` (class AutoencoderKL).

    Raises:
        CheckpointError: a feature that this family's autoencoder does not have.
    """
    _require(json, "vae", act_fn="silu", shift_factor=None, use_quant_conv=True, use_post_quant_conv=True)
    _require(json, "vae", mid_block_add_attention=True)
    for kind in ("down", "up"):
        expected = f"{kind.capitalize()}{'En' if kind == 'down' else 'De'}coderBlock2D"
        for block in _names(json, f"{kind}_block_types", []):
            _one_of(block, (expected,), f"vae {kind}_block_types")
    return AutoencoderConfig(
        in_channels=_count(json, "in_channels", 3),
        latent_channels=_count(json, "latent_channels", 4),
        block_out_channels=_counts(json, "block_out_channels", (64,)),
        layers_per_block=_few(json, "layers_per_block", 1),
        groups=_count(json, "norm_num_groups", 32),
        scaling_factor=_number(json, "scaling_factor", 0.18215),
    )


def vae_json(config: AutoencoderConfig) -> dict[str, Any]:
    """What diffusers' AutoencoderKL reads."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.groups,
        "out_channels": config.in_channels,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_config(json: Json) -> ClipTextConfig:
    """From `text_encoder/config.json` (class CLIPTextModel); transformers' defaults where a key is absent."""
    return ClipTextConfig(
        vocab_size=_count(json, "vocab_size", 49408),
        width=_count(json, "hidden_size", 512),
        inner_width=_count(json, "intermediate_size", 2048),
        layers=_few(json, "num_hidden_layers", 12),
        heads=_count(json, "num_attention_heads", 8),
        positions=_count(json, "max_position_embeddings", 77),
        activation=("quick_gelu", "gelu")[
            _one_of(json.get("hidden_act", "quick_gelu"), ("quick_gelu", "gelu"), "hidden_act")
        ],
        eps=_number(json, "layer_norm_eps", 1e-5),
    )


def text_json(config: ClipTextConfig) -> dict[str, Any]:
    """What transformers' CLIPTextModel reads."""
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
        "pad_token_id": config.vocab_size - 1,
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "intermediate_size": config.inner_width,
        "layer_norm_eps": config.eps,
        "max_position_embeddings": config.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "projection_dim": config.width,
        "vocab_size": config.vocab_size,
    }


def _count(json: Json, key: str, default: int) -> int:
    """A number of channels, layers, heads: whole and positive."""
    return _counts({key: [json.get(key, default)]}, key, ())[0]


def _few(json: Json, key: str, default: int) -> int:
    """A number of modules to build."""
    count = _count(json, key, default)
    if count > LAYERS:
        raise CheckpointError(f"config.json: {key} is {count}; expected at most {LAYERS}")
    return count


def _counts(json: Json, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    values = json.get(key, default)
    fits = isinstance(values, list | tuple) and all(type(v) is int and 0 < v <= MOST for v in values)
    if not fits or len(values) > LEVELS:
        raise CheckpointError(f"config.json: {key} is {values!r}; expected whole numbers from 1 to {MOST:,}")
    return tuple(values)


def _number(json: Json, key: str, default: float) -> float:
    value = json.get(key, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {key} is {value!r}; expected a positive number")
    return float(value)


def _names(json: Json, key: str, default: list[str]) -> list[str]:
    values = json.get(key, default)
    if not isinstance(values, list) or len(values) > LEVELS:
        raise CheckpointError(f"config.json: {key} is {values!r}; expected the name of a block for every level")
    return values


def _require(json: Json, part: str, **expected: object) -> None:
    for key, value in expected.items():
        if json.get(key, value) != value:
            raise CheckpointError(f"{part}/config.json: {key} is {json[key]!r}; Stable Diffusion 1 has {value!r}")


def _one_of(value: object, known: tuple[str, ...], key: str) -> bool:
    """Whether it is the second of the known values."""
    if value not in known:
        raise CheckpointError(f"{key} has {value!r}; Stable Diffusion 1 has {' or '.join(known)}")
    return known.index(str(value)) == 1
