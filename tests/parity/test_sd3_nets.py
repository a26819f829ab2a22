"""The networks of Stable Diffusion 3 against diffusers and transformers: same weights, same input, same answer.

Tolerance 1e-5 of the largest number, as in test_nets. Names and shapes are compared whole, so that a folder loads with
no table.
"""

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reverie.nets.autoencoder import SD3_AUTOENCODER, Autoencoder
from reverie.nets.mmdit import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, MMDiT, MMDiTConfig
from reverie.nets.t5 import T5Config, T5Encoder, position_buckets
from reverie.nets.taesd import TAESD, TAESD3, TinyAutoencoder, TinyAutoencoderConfig
from tests import tiny
from tests.parity.test_nets import RELATIVE, difference, loaded, rand, shaken

diffusers: Any = import_module("diffusers")
transformers: Any = import_module("transformers")


def shapes(network: Any) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in network.state_dict().items()}


# Transformer

TINY = MMDiTConfig(layers=3, heads=4, head_width=16, context_width=40, vector_width=24, positions=24, base_positions=8)
CONFIGS = {
    "SD3": TINY,
    "SD3.5 large": replace(TINY, qk_norm=True),
    "SD3.5 medium": replace(TINY, qk_norm=True, dual_attention=(0, 1)),
    "dual attention in the last block": replace(TINY, dual_attention=(2,)),
    "other channels and patches": replace(TINY, in_channels=3, out_channels=5, patch_size=4),
    "one block": replace(TINY, layers=1),
}


def transformer(c: MMDiTConfig) -> Any:
    """What diffusers builds of a config."""
    return diffusers.SD3Transformer2DModel(
        sample_size=c.base_positions * c.patch_size, patch_size=c.patch_size, in_channels=c.in_channels,
        out_channels=c.out_channels, num_layers=c.layers, attention_head_dim=c.head_width,
        num_attention_heads=c.heads, joint_attention_dim=c.context_width, caption_projection_dim=c.width,
        pooled_projection_dim=c.vector_width, pos_embed_max_size=c.positions,
        dual_attention_layers=c.dual_attention, qk_norm="rms_norm" if c.qk_norm else None,
    ).eval()  # fmt: skip


def pair(config: MMDiTConfig) -> tuple[Any, MMDiT]:
    """Both with the same weights; those of norms are other than 1."""
    torch.manual_seed(0)
    reference = transformer(config)
    for name, weight in reference.named_parameters():
        if ".norm_" in name and weight.ndim == 1:
            nn.init.normal_(weight, 1.0, 0.2)
    with torch.device("meta"):
        ours = MMDiT(config)
    return reference, loaded(ours, reference)


def inputs(config: MMDiTConfig, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    context, vector = rand(2, 7, config.context_width, seed=1), rand(2, config.vector_width, seed=2)
    return rand(2, config.in_channels, *size), torch.tensor([3.0, 870.25]), context, vector


@pytest.mark.parametrize("size", [(16, 16), (8, 20), (48, 4)])
@pytest.mark.parametrize("kind", list(CONFIGS))
@torch.no_grad()
def test_transformer(kind: str, size: tuple[int, int]) -> None:
    reference, ours = pair(CONFIGS[kind])
    x, timesteps, context, vector = inputs(CONFIGS[kind], size)
    want = reference(x, context, vector, timesteps).sample
    assert difference(ours(x, timesteps, context, vector), want) < RELATIVE


@pytest.mark.parametrize("skip", [{0}, {1}, {2}, {0, 2}, {0, 1, 2}])
@torch.no_grad()
def test_transformer_skipping_blocks(skip: set[int]) -> None:
    config = CONFIGS["SD3.5 medium"]
    reference, ours = pair(config)
    x, timesteps, context, vector = inputs(config, (8, 12))
    want = reference(x, context, vector, timesteps, skip_layers=list(skip)).sample
    assert difference(ours(x, timesteps, context, vector, frozenset(skip)), want) < RELATIVE


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_positions_of_a_new_transformer(kind: str) -> None:
    assert torch.equal(MMDiT(CONFIGS[kind]).pos_embed.pos_embed, transformer(CONFIGS[kind]).pos_embed.pos_embed)


@pytest.mark.parametrize("config", [SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE])
def test_true_transformers_have_the_names_and_shapes_of_diffusers(config: MMDiTConfig) -> None:
    with torch.device("meta"):
        assert shapes(MMDiT(config)) == shapes(transformer(config))


@pytest.mark.slow
@pytest.mark.parametrize("config", [SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE])
@torch.no_grad()
def test_transformer_at_true_width(config: MMDiTConfig) -> None:
    """Three of the 24 or 38 blocks, one of them with two attentions and one the last; 512 x 768 pixels.

    About 4 GB: all blocks of the smallest would need 8, and show nothing that three do not.
    """
    few = replace(config, layers=3, dual_attention=config.dual_attention[:1])
    reference, ours = pair(few)
    x, timesteps, context, vector = (t[:1] for t in inputs(few, (64, 96)))
    want = reference(x, context, vector, timesteps).sample
    assert difference(ours(x, timesteps, context, vector), want) < RELATIVE


# T5


def t5(**settings: Any) -> Any:
    shape = {"vocab_size": 99, "d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 4}
    config = transformers.T5Config(**{**shape, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, **settings})
    return transformers.T5EncoderModel(config).eval()


def t5_pair(**settings: Any) -> tuple[Any, T5Encoder]:
    torch.manual_seed(0)
    reference = t5(**settings)
    for name, weight in reference.named_parameters():
        if name.endswith("layer_norm.weight"):
            nn.init.normal_(weight, 1.0, 0.2)
    c = reference.config
    ours = T5Encoder(
        T5Config(
            vocab_size=c.vocab_size, width=c.d_model, inner_width=c.d_ff, layers=c.num_layers, heads=c.num_heads,
            head_width=c.d_kv, buckets=c.relative_attention_num_buckets,
            max_distance=c.relative_attention_max_distance, eps=c.layer_norm_epsilon,
        )
    )  # fmt: skip
    tensors = t5_weights(reference)
    assert {name: t.shape for name, t in tensors.items()} == shapes(ours)
    ours.load_state_dict(tensors, strict=True, assign=True)
    return reference, ours.eval()


def t5_weights(reference: Any) -> dict[str, Tensor]:
    tensors = dict(reference.state_dict())
    again = tensors.pop("encoder.embed_tokens.weight")
    assert again.data_ptr() == tensors["shared.weight"].data_ptr()
    return tensors


def words(length: int) -> Tensor:
    return torch.randint(0, 99, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [1, 9, 77, 300])
@pytest.mark.parametrize(
    "settings",
    [{}, {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}, {"layer_norm_epsilon": 0.1}],
)
@torch.no_grad()
def test_t5(settings: dict[str, Any], length: int) -> None:
    reference, ours = t5_pair(**settings)
    assert difference(ours(words(length)), reference(words(length)).last_hidden_state) < RELATIVE


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (64, 500)])
def test_t5_buckets(buckets: int, max_distance: int) -> None:
    attention: Any = import_module("transformers.models.t5.modeling_t5").T5Attention
    places = torch.arange(600)
    want = attention._relative_position_bucket(
        places[None, :] - places[:, None], num_buckets=buckets, max_distance=max_distance
    )
    assert torch.equal(position_buckets(600, buckets, max_distance), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_t5_in_half_precision_is_nearer_than_transformers(dtype: torch.dtype) -> None:
    """Mean error to float32 over 24 layers, because our sums are float32: 0.71 of transformers' in both formats."""
    reference, ours = t5_pair(num_layers=24)
    want = ours(words(77))
    errors = [
        (half.float() - want).abs().mean()
        for half in (ours.to(dtype)(words(77)), reference.to(dtype)(words(77)).last_hidden_state)
    ]
    assert errors[0] < 0.85 * errors[1]


def test_true_t5_has_the_names_and_shapes_of_transformers() -> None:
    with torch.device("meta"):
        reference = t5(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        want = shapes(reference)
        del want["encoder.embed_tokens.weight"]
        assert shapes(T5Encoder(T5Config())) == want


# Tiny autoencoder

TINIES: dict[str, tuple[TinyAutoencoderConfig, dict[str, Any]]] = {
    "taesd": (TAESD, {}),
    "taesd3": (TAESD3, {"latent_channels": 16}),
    "smaller": (
        TinyAutoencoderConfig(width=8, encoder_blocks=(1, 2), decoder_blocks=(2, 1), magnitude=3.0),
        {
            "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
            "num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(TINIES))
@torch.no_grad()
def test_tiny_autoencoder(kind: str) -> None:
    config, settings = TINIES[kind]
    torch.manual_seed(0)
    reference = diffusers.AutoencoderTiny(**settings).eval()
    ours = TinyAutoencoder(config)
    assert shapes(ours) == shapes(reference)
    loaded(ours, reference)
    pictures = rand(2, 3, 32, 48).clamp(-1, 1)
    latents = reference.encode(pictures).latents
    assert difference(ours.encode(pictures), latents) < RELATIVE
    z = 3 * rand(*latents.shape, seed=1)  # some beyond the magnitude
    assert difference(ours.decode(z), reference.decode(z).sample) < RELATIVE


# Autoencoder


def sd3_vae(**settings: Any) -> Any:
    return tiny.vae(
        latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
        use_post_quant_conv=False, **settings,
    )  # fmt: skip


@torch.no_grad()
def test_sd3_autoencoder() -> None:
    torch.manual_seed(0)
    reference = shaken(sd3_vae())
    config = replace(SD3_AUTOENCODER, block_out_channels=(32, 32, 64), layers_per_block=1)
    assert (config.scaling_factor, config.shift_factor) == (1.5305, 0.0609)
    assert shapes(Autoencoder(config)) == shapes(reference)
    ours = loaded(Autoencoder(config), reference)
    pictures = rand(2, 3, 32, 24).clamp(-1, 1)
    mean, log_variance = ours.encode(pictures)
    want = reference.encode(pictures).latent_dist
    assert difference(mean, want.mean) < RELATIVE
    assert difference(log_variance, want.logvar) < RELATIVE
    z = rand(*mean.shape, seed=1)
    assert difference(ours.decode(z), reference.decode(z).sample) < RELATIVE


def test_true_sd3_autoencoder_has_the_names_and_shapes_of_diffusers() -> None:
    with torch.device("meta"):
        reference = sd3_vae(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
        assert shapes(Autoencoder(SD3_AUTOENCODER)) == shapes(reference)


def test_sd3_latents_are_shifted_then_scaled() -> None:
    """diffusers' pipelines: `(z - shift_factor) * scaling_factor`, and back."""
    z = rand(2, 16, 4, 4)
    assert torch.equal(SD3_AUTOENCODER.scaled(z), (z - 0.0609) * 1.5305)
    torch.testing.assert_close(SD3_AUTOENCODER.unscaled(SD3_AUTOENCODER.scaled(z)), z)
