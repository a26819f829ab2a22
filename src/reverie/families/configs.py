"""The configs of the networks that several families share, from and to the JSON of a diffusers folder.

Only what changes the network is read. A value that would need a network we do not have is an error, not ignored.
"""

from typing import Any

from reverie.errors import CheckpointError
from reverie.families.json_config import LAYERS, Json, JsonConfig
from reverie.nets.autoencoder import AutoencoderConfig
from reverie.nets.clip_text import ACTIVATIONS, ClipTextConfig
from reverie.nets.unet import Depths, UNetConfig, VectorKind

DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
MIDDLE = {"UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None}
MOST_TRANSFORMERS = 2000  # blocks of transformers in one U-Net; SDXL has 70

# Settings of UNet2DConditionModel that no published Stable Diffusion has otherwise, by their only value.
FIXED: dict[str, object] = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "norm_eps": 1e-5, "mid_block_scale_factor": 1,
    "freq_shift": 0, "flip_sin_to_cos": True, "downsample_padding": 1, "center_input_sample": False,
    "dual_cross_attention": False, "resnet_time_scale_shift": "default", "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0, "conv_in_kernel": 3, "conv_out_kernel": 3, "time_embedding_type": "positional",
    "time_embedding_dim": None, "time_embedding_act_fn": None, "timestep_post_act": None, "encoder_hid_dim": None,
    "encoder_hid_dim_type": None, "attention_type": "default", "class_embeddings_concat": False,
    "cross_attention_norm": None, "num_attention_heads": None,
}  # fmt: skip


def unet_config(json: Json) -> UNetConfig:
    """From `unet/config.json` (class UNet2DConditionModel); diffusers' own defaults where a key is absent.

    Raises:
        CheckpointError: a feature that no Stable Diffusion has, or values that contradict one another.
    """
    c = JsonConfig(json, "unet/config.json")
    c.require(**FIXED)
    widths = c.counts("block_out_channels", (320, 640, 1280, 1280))
    levels = len(widths)
    layers = c.same("layers_per_block", 2, levels)
    if layers > LAYERS:
        raise c.error("layers_per_block", f"at most {LAYERS}")
    attention, up_attention, middle = _attention(c, levels)
    kind, width = _vector(c)
    return UNetConfig(
        in_channels=c.count("in_channels", 4),
        out_channels=c.count("out_channels", 4),
        block_out_channels=widths,
        attention=attention,
        # diffusers calls the number of heads `attention_head_dim` (its issue 2011).
        heads=c.each("attention_head_dim", 8, levels),
        layers_per_block=layers,
        context_width=c.same("cross_attention_dim", 1280, levels),
        groups=c.count("norm_num_groups", 32),
        linear_projection=c.flag("use_linear_projection"),
        up_attention=None if up_attention == attention[::-1] else up_attention,
        mid_attention=middle,
        cross_only=_cross_only(c, attention),
        vector=kind,
        vector_width=width,
        size_width=c.count("addition_time_embed_dim", 256) if kind == "add_embedding" else 256,
        guidance_width=c.count("time_cond_proj_dim", 256) if c.has("time_cond_proj_dim") else 0,
    )


def _attention(c: JsonConfig, levels: int) -> tuple[Depths, Depths, int | None]:
    """Depths of the transformers on the way down, on the way up, and in the middle."""
    down = c.names("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], DOWN)
    up = c.names("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, UP)
    for key, blocks in (("down_block_types", down), ("up_block_types", up)):
        if len(blocks) != levels:
            raise c.error(key, f"a block for each of the {levels} levels of block_out_channels")
    depths = _depths(c, "transformer_layers_per_block", levels)
    way_up = depths[::-1]
    if c.has("reverse_transformer_layers_per_block"):
        way_up = _depths(c, "reverse_transformer_layers_per_block", levels)
    kind = c.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if kind not in MIDDLE:
        raise c.error("mid_block_type", f"one of {', '.join(map(str, MIDDLE))}")
    last = depths[-1] if isinstance(depths[-1], int) else depths[-1][0]
    middle = None if kind is None else last if kind == "UNetMidBlock2DCrossAttn" else 0
    return (
        tuple(depth if block == DOWN[1] else 0 for depth, block in zip(depths, down, strict=True)),
        tuple(depth if block == UP[1] else 0 for depth, block in zip(way_up, up, strict=True)),
        middle,
    )


def _depths(c: JsonConfig, key: str, levels: int) -> Depths:
    """Depths for each level: one number for all, or for each level one number or one for each residual block."""
    value = c.get(key, 1)
    values = value if isinstance(value, list) else [value] * levels
    found = [depth if isinstance(depth, list) and depth else [depth] for depth in values]
    numbers = [n for level in found for n in level]
    if len(found) != levels or not all(type(n) is int and 0 < n <= LAYERS for n in numbers):
        raise c.error(key, f"depths from 1 to {LAYERS} for {levels} levels")
    if sum(numbers) > MOST_TRANSFORMERS:
        raise c.error(key, f"at most {MOST_TRANSFORMERS} in all")
    return tuple(level[0] if len(set(level)) == 1 else tuple(level) for level in found)


def _cross_only(c: JsonConfig, attention: Depths) -> tuple[bool, ...]:
    value = c.get("only_cross_attention", False)
    values = value if isinstance(value, list) else [value] * len(attention)
    if len(values) != len(attention) or not all(isinstance(v, bool) for v in values):
        raise c.error("only_cross_attention", "true or false, once or for every level")
    found = tuple(bool(v and depth) for v, depth in zip(values, attention, strict=True))
    return found if any(found) else ()


def _vector(c: JsonConfig) -> tuple[VectorKind, int]:
    """How a vector enters, and its width."""
    key = "projection_class_embeddings_input_dim"
    if c.has("addition_embed_type"):
        c.require(addition_embed_type="text_time", class_embed_type=None, num_class_embeds=None)
        if not c.has(key):
            raise c.error(key, "the width of the vector, since addition_embed_type is 'text_time'")
        return "add_embedding", c.count(key, 0)
    if c.has("class_embed_type"):
        c.require(class_embed_type="projection", num_class_embeds=None)
        return "class_embedding", c.count(key, 0)
    if c.has("num_class_embeds"):
        return "class_table", c.count("num_class_embeds", 0)
    return "", 0


def unet_json(config: UNetConfig) -> dict[str, Any]:
    """What diffusers' UNet2DConditionModel reads.

    Raises:
        CheckpointError: a middle deeper than the last level, which diffusers cannot say.
    """
    levels = range(len(config.block_out_channels))
    down = [config.down_depths(level) for level in levels]
    up = [config.up_depths(level) for level in reversed(levels)]
    return {
        **FIXED,
        "attention_head_dim": config.heads[0] if len(set(config.heads)) == 1 else list(config.heads),
        "block_out_channels": list(config.block_out_channels),
        "cross_attention_dim": config.context_width,
        "down_block_types": [DOWN[any(depths)] for depths in down],
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.groups,
        "out_channels": config.out_channels,
        "up_block_types": [UP[any(depths)] for depths in up],
        "use_linear_projection": config.linear_projection,
        **_depths_json(config, down, up),
        **_vector_json(config),
    }


def _depths_json(config: UNetConfig, down: list[tuple[int, ...]], up: list[tuple[int, ...]]) -> dict[str, Any]:
    middle, said = config.mid_attention, [_short(depths) for depths in down]
    if middle and not any(down[-1]):
        said[-1] = middle
    elif middle and middle != down[-1][0]:
        raise CheckpointError(f"a middle of depth {middle} beside {down[-1][0]} has no place in a config of diffusers")
    found: dict[str, Any] = {"transformer_layers_per_block": 1 if all(depth == 1 for depth in said) else said}
    if config.up_attention is not None:
        found["reverse_transformer_layers_per_block"] = [_short(depths) for depths in up]
    if not middle:
        found["mid_block_type"] = None if middle is None else "UNetMidBlock2D"
    return found


def _short(depths: tuple[int, ...]) -> int | list[int]:
    """One number where they are all the same; 1 where there is no transformer."""
    return list(depths) if len(set(depths)) > 1 else max(depths[0], 1)


def _vector_json(config: UNetConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if config.vector == "add_embedding":
        found = {"addition_embed_type": "text_time", "addition_time_embed_dim": config.size_width}
    elif config.vector == "class_embedding":
        found = {"class_embed_type": "projection"}
    if config.vector == "class_table":
        found = {"num_class_embeds": config.vector_width}
    elif config.vector:
        found["projection_class_embeddings_input_dim"] = config.vector_width
    if config.cross_only:
        found["only_cross_attention"] = list(config.cross_only)
    if config.guidance_width:
        found["time_cond_proj_dim"] = config.guidance_width
    return found


def vae_config(json: Json) -> AutoencoderConfig:
    """From `vae/config.json` (class AutoencoderKL).

    Raises:
        CheckpointError: a feature that no Stable Diffusion's autoencoder has.
    """
    c = JsonConfig(json, "vae/config.json")
    pictures = c.count("in_channels", 3)
    c.require(_class_name="AutoencoderKL", act_fn="silu", mid_block_add_attention=True, out_channels=pictures)
    widths = c.counts("block_out_channels", (64,))
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if len(c.names(key, [kind] * len(widths), (kind,))) != len(widths):
            raise c.error(key, f"a block for each of the {len(widths)} levels of block_out_channels")
    latents = c.count("latent_channels", 4)
    mean, std = latent_statistics(c, latents)
    return AutoencoderConfig(
        in_channels=pictures,
        latent_channels=latents,
        block_out_channels=widths,
        layers_per_block=c.few("layers_per_block", 1),
        groups=c.count("norm_num_groups", 32),
        scaling_factor=c.number("scaling_factor", 0.18215),
        shift_factor=c.number("shift_factor", 0.0) if c.get("shift_factor") else 0.0,
        quant_conv=c.flag("use_quant_conv", True),
        post_quant_conv=c.flag("use_post_quant_conv", True),
        latents_mean=mean,
        latents_std=std,
    )


def latent_statistics(c: JsonConfig, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`latents_mean` and `latents_std`, one number a channel, or none."""
    mean, std = c.numbers("latents_mean"), c.numbers("latents_std")
    if (mean or std) and not (len(mean) == len(std) == channels and min(std) > 0):
        raise c.error("latents_std", f"{channels} numbers above zero, and as many of latents_mean")
    return mean, std


def vae_json(config: AutoencoderConfig) -> dict[str, Any]:
    """What diffusers' AutoencoderKL reads."""
    levels = len(config.block_out_channels)
    found: dict[str, Any] = {
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
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.post_quant_conv,
    }
    if config.shift_factor:
        found["shift_factor"] = config.shift_factor
    if config.latents_mean:
        found |= {"latents_mean": list(config.latents_mean), "latents_std": list(config.latents_std)}
    return found


def text_config(json: Json, *, projected: bool = False) -> ClipTextConfig:
    """From `text_encoder/config.json` of CLIP's text encoder; transformers' defaults where a key is absent.

    Args:
        projected: whether its weights have a projection of the pooled output (`CLIPTextModelWithProjection`): a
            config has its width in both cases.
    """
    c = JsonConfig(json, "text_encoder/config.json")
    c.require(model_type="clip_text_model")
    return ClipTextConfig(
        vocab_size=c.count("vocab_size", 49408),
        width=c.count("hidden_size", 512),
        inner_width=c.count("intermediate_size", 2048),
        layers=c.few("num_hidden_layers", 12),
        heads=c.count("num_attention_heads", 8),
        positions=c.count("max_position_embeddings", 77),
        activation=c.one_of("hidden_act", "quick_gelu", tuple(ACTIVATIONS)),
        eps=c.number("layer_norm_eps", 1e-5),
        projection_width=c.count("projection_dim", 512) if projected else 0,
    )


def text_json(config: ClipTextConfig) -> dict[str, Any]:
    """What transformers' CLIPTextModel, or with a projection its CLIPTextModelWithProjection, reads."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if config.projection_width else "CLIPTextModel"],
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
        "projection_dim": config.projection_width or config.width,
        "vocab_size": config.vocab_size,
    }
