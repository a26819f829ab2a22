"""The configs of a diffusers folder: what is refused, and why. What is read right is in test_published.py."""

from collections.abc import Callable
from typing import Any

import pytest

from reverie.errors import CheckpointError
from reverie.families import configs
from reverie.families.json_config import JsonConfig, read_json
from reverie.families.sd3 import configs as sd3
from reverie.nets.unet import UNetConfig
from tests.families import published

Reader = Callable[[dict[str, Any]], object]
XL = published.XL
READERS: dict[str, tuple[Reader, dict[str, Any]]] = {
    "unet": (configs.unet_config, XL),
    "vae": (configs.vae_config, published.VAE),
    "text": (configs.text_config, published.CLIP_L),
    "transformer": (sd3.transformer_config, published.TRANSFORMER),
    "t5": (sd3.t5_config, published.T5),
}


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("unet", {"_class_name": "UNet3DConditionModel"}, "_class_name is 'UNet3DConditionModel'"),
        ("unet", {"act_fn": "gelu"}, "act_fn is 'gelu'; Stable Diffusion has 'silu'"),
        ("unet", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type"),
        ("unet", {"class_embeddings_concat": True}, "class_embeddings_concat"),
        ("unet", {"addition_embed_type": "image"}, "addition_embed_type is 'image'"),
        ("unet", {"projection_class_embeddings_input_dim": None}, "since addition_embed_type is 'text_time'"),
        ("unet", {"class_embed_type": "projection"}, "class_embed_type is 'projection'"),
        ("unet", {"block_out_channels": [320, 640]}, "a block for each of the 2 levels"),
        ("unet", {"block_out_channels": []}, "block_out_channels is []"),
        ("unet", {"block_out_channels": [32] * 17}, "for 1 to 16 levels"),
        ("unet", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
        ("unet", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ("unet", {"transformer_layers_per_block": [1, 2]}, "transformer_layers_per_block is [1, 2]"),
        ("unet", {"transformer_layers_per_block": [1, 2, 0]}, "depths from 1 to 200"),
        ("unet", {"transformer_layers_per_block": [1, 2, True]}, "depths from 1 to 200"),
        ("unet", {"transformer_layers_per_block": [[200] * 20, 1, 1]}, "at most 2000 in all"),
        ("unet", {"reverse_transformer_layers_per_block": "ten"}, "reverse_transformer_layers_per_block"),
        ("unet", {"layers_per_block": 201}, "layers_per_block is 201; expected at most 200"),
        ("unet", {"layers_per_block": [1, 2, 1]}, "the same number for every level"),
        ("unet", {"attention_head_dim": [5, 10]}, "attention_head_dim is [5, 10]; expected one number, or 3"),
        ("unet", {"only_cross_attention": [True]}, "only_cross_attention"),
        ("unet", {"only_cross_attention": "yes"}, "only_cross_attention"),
        ("unet", {"use_linear_projection": "yes"}, "use_linear_projection is 'yes'; expected true or false"),
        ("unet", {"time_cond_proj_dim": -1}, "time_cond_proj_dim is -1"),
        ("vae", {"act_fn": "relu"}, "act_fn is 'relu'"),
        ("vae", {"out_channels": 4}, "out_channels is 4"),
        ("vae", {"up_block_types": ["UpDecoderBlock2D"]}, "a block for each of the 4 levels"),
        ("vae", {"latents_mean": [0.0], "latents_std": [1.0]}, "4 numbers above zero"),
        ("vae", {"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 1.0, 0.0]}, "4 numbers above zero"),
        ("vae", {"latents_mean": [float("nan")] * 4, "latents_std": [1.0] * 4}, "latents_mean"),
        ("vae", {"scaling_factor": 0}, "scaling_factor is 0; expected a positive number"),
        ("vae", {"shift_factor": float("inf")}, "shift_factor is inf"),
        ("text", {"model_type": "roberta_series"}, "model_type is 'roberta_series'"),
        ("text", {"hidden_act": "relu"}, "hidden_act has 'relu'"),
        ("text", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ("transformer", {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ("transformer", {"dual_attention_layers": [24]}, "indices of blocks from 0 to 23"),
        ("transformer", {"caption_projection_dim": 1}, "caption_projection_dim is 1; expected 1536"),
        ("t5", {"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'; expected gated-gelu"),
        ("t5", {"model_type": "bert"}, "model_type is 'bert'"),
    ],
)
def test_what_is_refused(kind: str, change: dict[str, Any], said: str) -> None:
    read, json = READERS[kind]
    read(json)
    with pytest.raises(CheckpointError) as caught:
        read(json | change)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", list(READERS))
@pytest.mark.parametrize("value", ["abc", -3, 1.5, [], {}, True, 10**30], ids=repr)
def test_no_value_of_another_kind_gets_through(kind: str, value: object) -> None:
    """Whatever stands in the place of a count is refused, and never a traceback."""
    read, json = READERS[kind]
    for key, found in json.items():
        if type(found) is int and key not in {"sample_size", "bos_token_id", "eos_token_id", "pad_token_id"}:
            if key == "projection_dim":  # read only where there is a projection
                continue
            with pytest.raises(CheckpointError, match=key):
                read(json | {key: value})


def test_one_number_or_one_for_each_level() -> None:
    spelt = {
        "layers_per_block": [2, 2, 2],
        "cross_attention_dim": [2048] * 3,
        "transformer_layers_per_block": [1, 2, 10],
    }
    assert configs.unet_config(XL | spelt) == configs.unet_config(XL)
    assert configs.unet_config(XL | {"transformer_layers_per_block": 2}) == configs.unet_config(
        XL | {"transformer_layers_per_block": [2, 2, 2]}
    )


def test_null_is_absent_where_diffusers_writes_it() -> None:
    nulls = {"class_embed_type": None, "num_class_embeds": None, "time_cond_proj_dim": None, "upcast_attention": None,
             "reverse_transformer_layers_per_block": None, "num_attention_heads": None}  # fmt: skip
    assert configs.unet_config(XL | nulls) == configs.unet_config(XL)


def test_only_cross_attention_counts_where_there_is_attention() -> None:
    json = published.UNETS["stable-diffusion-x4-upscaler"]
    assert configs.unet_config(json).cross_only == (False, True, True, False)
    assert configs.unet_config(json | {"only_cross_attention": True}).cross_only == (False, True, True, True)
    assert configs.unet_config(json | {"only_cross_attention": False}).cross_only == ()


def test_a_middle_that_diffusers_cannot_say_is_not_written() -> None:
    with pytest.raises(CheckpointError, match="a middle of depth 3 beside 1"):
        configs.unet_json(UNetConfig(attention=(1, 1, 1, 1), mid_attention=3))


def test_numbers_and_flags() -> None:
    c = JsonConfig({"a": None, "b": [1, 2.5], "c": True}, "x/config.json")
    assert (c.has("a"), c.has("b"), c.has("d")) == (False, True, False)
    assert c.numbers("b") == (1.0, 2.5)
    assert c.numbers("a") == ()
    assert (c.flag("c"), c.flag("a", True), c.flag("d")) == (True, True, False)
    with pytest.raises(CheckpointError, match=r"x/config\.json: c is True; expected a list of numbers"):
        c.numbers("c")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is missing; a diffusers folder has it"),
        (b"{", "cannot read"),
        (b"[]", "not a JSON object"),
        (b"\xff", "cannot read"),
    ],
)
def test_read_json(tmp_path: Any, content: bytes | None, said: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        read_json(path)
