"""The configs of the networks that only Stable Diffusion 3 has, from and to the JSON of a diffusers folder."""

from typing import Any

from reverie.errors import CheckpointError
from reverie.families.json_config import Json, JsonConfig
from reverie.nets.mmdit import MMDiTConfig
from reverie.nets.t5 import T5Config

TRANSFORMER_CLASS, T5_MODEL = "SD3Transformer2DModel", "t5"


def transformer_config(json: Json) -> MMDiTConfig:
    """From `transformer/config.json` (class SD3Transformer2DModel); diffusers' own defaults where a key is absent.

    Raises:
        CheckpointError: a feature that Stable Diffusion 3 does not have, or values that contradict one another.
    """
    c = JsonConfig(json, "transformer/config.json")
    c.require(_class_name=TRANSFORMER_CLASS)
    layers, patch = c.few("num_layers", 18), c.count("patch_size", 2)
    dual = c.get("dual_attention_layers") or []
    if not isinstance(dual, list | tuple) or not all(type(i) is int and 0 <= i < layers for i in dual):
        raise c.error("dual_attention_layers", f"indices of blocks from 0 to {layers - 1}")
    norm = c.get("qk_norm")
    if norm not in (None, "rms_norm"):
        raise c.error("qk_norm", "rms_norm or null")
    config = MMDiTConfig(
        in_channels=c.count("in_channels", 16),
        out_channels=c.count("out_channels", 16),
        patch_size=patch,
        layers=layers,
        heads=c.count("num_attention_heads", 18),
        head_width=c.count("attention_head_dim", 64),
        context_width=c.count("joint_attention_dim", 4096),
        vector_width=c.count("pooled_projection_dim", 2048),
        positions=c.count("pos_embed_max_size", 96),
        base_positions=c.count("sample_size", 128) // patch,
        qk_norm=norm is not None,
        dual_attention=tuple(sorted(set(dual))),
    )
    if c.count("caption_projection_dim", 1152) != config.width:
        raise CheckpointError(
            f"transformer/config.json: caption_projection_dim is {c.get('caption_projection_dim')}; expected "
            f"{config.width}, which is num_attention_heads times attention_head_dim"
        )
    return config


def transformer_json(config: MMDiTConfig) -> dict[str, Any]:
    """What diffusers' SD3Transformer2DModel reads."""
    return {
        "_class_name": TRANSFORMER_CLASS,
        "attention_head_dim": config.head_width,
        "caption_projection_dim": config.width,
        "dual_attention_layers": list(config.dual_attention),
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context_width,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "pooled_projection_dim": config.vector_width,
        "pos_embed_max_size": config.positions,
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "sample_size": config.base_positions * config.patch_size,
    }


def t5_config(json: Json) -> T5Config:
    """From `text_encoder_3/config.json` (class T5EncoderModel); transformers' defaults where a key is absent.

    Raises:
        CheckpointError: a T5 of version 1.0, whose feed-forward has no gate, or impossible values.
    """
    c = JsonConfig(json, "text_encoder_3/config.json")
    c.require(model_type=T5_MODEL)
    if c.get("feed_forward_proj") != "gated-gelu":
        raise c.error("feed_forward_proj", "gated-gelu, as T5 version 1.1 has it")
    return T5Config(
        vocab_size=c.count("vocab_size", 32128),
        width=c.count("d_model", 512),
        inner_width=c.count("d_ff", 2048),
        layers=c.few("num_layers", 6),
        heads=c.count("num_heads", 8),
        head_width=c.count("d_kv", 64),
        buckets=c.count("relative_attention_num_buckets", 32),
        max_distance=c.count("relative_attention_max_distance", 128),
        eps=c.number("layer_norm_epsilon", 1e-6),
    )


def t5_json(config: T5Config) -> dict[str, Any]:
    """What transformers' T5EncoderModel reads."""
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": config.inner_width,
        "d_kv": config.head_width,
        "d_model": config.width,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": config.eps,
        "model_type": T5_MODEL,
        "num_heads": config.heads,
        "num_layers": config.layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.buckets,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }
