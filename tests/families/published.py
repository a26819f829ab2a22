"""The configs of published models, typed from their `config.json` and, for single files alone, from their headers.

Keys that do not change a network are left out. Sources: the folders of the names below on the Hugging Face hub; the
depths of SSD-1B, Vega and KOALA also stand in ComfyUI's `model_detection.py`.
"""

from typing import Any

DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def blocks(*attended: int) -> dict[str, Any]:
    """The blocks of each level, from full resolution down, with attention (1) or without."""
    return {"down_block_types": [DOWN[a] for a in attended], "up_block_types": [UP[a] for a in reversed(attended)]}


SD1: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "sample_size": 64, "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], **blocks(1, 1, 1, 0),
}  # fmt: skip
SD2 = SD1 | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
XL = SD1 | {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280], **blocks(0, 1, 1), "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
REFINER = XL | {
    "block_out_channels": [384, 768, 1536, 1536], "attention_head_dim": [6, 12, 24, 24], **blocks(0, 1, 1, 0),
    "transformer_layers_per_block": 4, "cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560,
}  # fmt: skip

UNETS: dict[str, dict[str, Any]] = {
    "stable-diffusion-v1-5": SD1,
    "stable-diffusion-inpainting": SD1 | {"in_channels": 9},
    "instruct-pix2pix": SD1 | {"in_channels": 8},
    "bk-sdm-base": SD1 | {"layers_per_block": 1},
    "bk-sdm-small": SD1 | {"layers_per_block": 1, "mid_block_type": None},
    "bk-sdm-tiny": SD1
    | {"layers_per_block": 1, "mid_block_type": None, "block_out_channels": [320, 640, 1280], **blocks(1, 1, 1)},
    "stable-diffusion-2-1": SD2,
    "stable-diffusion-2-inpainting": SD2 | {"in_channels": 9},
    "stable-diffusion-2-depth": SD2 | {"in_channels": 5},
    "stable-diffusion-2-1-unclip": SD2
    | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048, "sample_size": 96},
    "stable-diffusion-x4-upscaler": SD2
    | {
        "in_channels": 7, "attention_head_dim": 8, "block_out_channels": [256, 512, 512, 1024],
        **blocks(0, 1, 1, 1), "num_class_embeds": 1000, "only_cross_attention": [True, True, True, False],
    },
    "stable-diffusion-xl-base-1.0": XL,
    "stable-diffusion-xl-1.0-inpainting-0.1": XL | {"in_channels": 9},
    "stable-diffusion-xl-refiner-1.0": REFINER,
    "SSD-1B": XL
    | {
        "transformer_layers_per_block": [1, 2, 4], "mid_block_type": "UNetMidBlock2D",
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "Segmind-Vega": XL
    | {
        "transformer_layers_per_block": [1, 1, 2], "mid_block_type": "UNetMidBlock2D",
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
    },
    "koala-700m": XL | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5], "mid_block_type": None},
    "koala-1b": XL | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]},
}  # fmt: skip
# Under the names of a folder alone: the original layout has none for how this network is told the guidance scale.
LCM = SD1 | {"time_cond_proj_dim": 256}
# Millions of parameters, as model cards and papers say them: SD 1 860, BK-SDM 580, 490 and 330, SDXL 2600, its refiner
# 2300 (their files have two bytes for each of 2567 and 2260), SSD-1B 1300, Vega 745, KOALA 782 and 1161.
PARAMETERS = {
    "stable-diffusion-v1-5": 860, "bk-sdm-base": 580, "bk-sdm-small": 490, "bk-sdm-tiny": 330,
    "stable-diffusion-2-1": 866, "stable-diffusion-xl-base-1.0": 2567, "stable-diffusion-xl-refiner-1.0": 2260,
    "SSD-1B": 1300, "Segmind-Vega": 745, "koala-700m": 782, "koala-1b": 1161,
}  # fmt: skip

VAE: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2, "scaling_factor": 0.18215,
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
VAES: dict[str, dict[str, Any]] = {
    "stable-diffusion-v1-5": VAE,
    "stable-diffusion-xl-base-1.0": VAE | {"scaling_factor": 0.13025},
    "stable-diffusion-x4-upscaler": VAE
    | {
        "scaling_factor": 0.08333, "block_out_channels": [128, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
    },
    "stable-diffusion-3-medium-diffusers": VAE
    | {
        "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "playground-v2.5-1024px-aesthetic": VAE
    | {
        "scaling_factor": 0.5, "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    },
}  # fmt: skip

CLIP_L: dict[str, Any] = {
    "model_type": "clip_text_model", "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072,
    "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768, "vocab_size": 49408,
    "max_position_embeddings": 77, "layer_norm_eps": 1e-05, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
OPEN_CLIP_H = CLIP_L | {
    "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512,
}  # fmt: skip
OPEN_CLIP_G = CLIP_L | {
    "hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
    "num_hidden_layers": 32, "projection_dim": 1280,
}  # fmt: skip

TRANSFORMER: dict[str, Any] = {
    "attention_head_dim": 64, "caption_projection_dim": 1536, "in_channels": 16, "joint_attention_dim": 4096,
    "num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192, "sample_size": 128,
}  # fmt: skip
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "stable-diffusion-3-medium-diffusers": TRANSFORMER,
    "stable-diffusion-3.5-large": TRANSFORMER
    | {"caption_projection_dim": 2432, "num_attention_heads": 38, "num_layers": 38, "qk_norm": "rms_norm"},
    "stable-diffusion-3.5-medium": TRANSFORMER
    | {"dual_attention_layers": list(range(13)), "pos_embed_max_size": 384, "qk_norm": "rms_norm"},
}
T5: dict[str, Any] = {
    "model_type": "t5", "feed_forward_proj": "gated-gelu", "d_ff": 10240, "d_kv": 64, "d_model": 4096,
    "num_heads": 64, "num_layers": 24, "vocab_size": 32128, "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-06,
}  # fmt: skip
