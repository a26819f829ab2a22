"""The networks against diffusers and transformers: same weights, same input, same answer.

Tolerance 1e-5 of the largest number: float32 sums in another order differ by about 1e-6 (the slow ones, which are
deeper and wider, too). The tensor names are the same, so `load_state_dict(strict=True)` is a test of its own.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reverie.nets.autoencoder import Autoencoder, AutoencoderConfig
from reverie.nets.clip_text import ClipText, ClipTextConfig
from reverie.nets.unet import UNet, UNetConfig
from tests import tiny

RELATIVE = 1e-5


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loaded(network: nn.Module, reference: Any, prefix: str = "") -> Any:
    """Our network with the reference's weights."""
    names = network.state_dict()
    tensors = {name if name in names else prefix + name: t for name, t in reference.state_dict().items()}
    tensors.pop("text_model.embeddings.position_ids", None)
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval()


# Text encoder


def encoders(activation: str) -> tuple[Any, ClipText]:
    torch.manual_seed(0)
    reference = tiny.text_encoder(vocab_size=200, hidden_act=activation, num_attention_heads=4, num_hidden_layers=4,
                                  eos_token_id=199, bos_token_id=198, pad_token_id=199)  # fmt: skip
    for norm in (m for m in reference.modules() if isinstance(m, nn.LayerNorm)):  # 1 and 0 would hide a swap
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias, 0.0, 0.3)
    config = ClipTextConfig(vocab_size=200, width=64, inner_width=96, layers=4, heads=4, activation=activation)
    return reference, loaded(ClipText(config), reference, "text_model.")


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("length", [1, 9, 77])
@torch.no_grad()
def test_text_encoder(activation: str, length: int) -> None:
    reference, ours = encoders(activation)
    ids = torch.randint(0, 198, (3, length), generator=torch.Generator().manual_seed(0))
    assert difference(ours(ids), reference(ids).last_hidden_state) < RELATIVE


@pytest.mark.parametrize("skip", [0, 1, 2, 3, 4])
@torch.no_grad()
def test_text_encoder_clip_skip(skip: int) -> None:
    """`hidden_states[-1 - skip]` through the final norm: what diffusers does for its `clip_skip`."""
    reference, ours = encoders("quick_gelu")
    ids = torch.randint(0, 198, (2, 77), generator=torch.Generator().manual_seed(1))
    hidden = reference(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 5  # the embeddings and four layers: every layer is compared
    norm = getattr(reference, "text_model", reference).final_layer_norm
    assert difference(ours(ids, skip), norm(hidden[-1 - skip])) < RELATIVE


@torch.no_grad()
def test_text_encoder_is_causal() -> None:
    _, ours = encoders("gelu")
    ids = torch.randint(0, 198, (1, 10), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 198
    a, b = ours(ids), ours(changed)
    assert difference(a[:, :6], b[:, :6]) < RELATIVE
    assert difference(a[:, 6:], b[:, 6:]) > 100 * RELATIVE


# U-Net

UNETS: dict[str, dict[str, Any]] = {
    "two levels": {},
    "one layer a block": {"layers_per_block": 1},
    "linear projection": {"use_linear_projection": True},
    "heads a level": {"attention_head_dim": (4, 8)},
    "three levels, attention in the middle": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "attention everywhere": {
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    },
    "9 channels in": {"in_channels": 9},
    "one level": {
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    },
}


def unet_config(reference: Any) -> UNetConfig:
    c = reference.config
    heads = c.attention_head_dim
    return UNetConfig(
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        block_out_channels=tuple(c.block_out_channels),
        attention=tuple("CrossAttn" in kind for kind in c.down_block_types),
        heads=tuple(heads) if isinstance(heads, (tuple, list)) else (heads,) * len(c.block_out_channels),
        layers_per_block=c.layers_per_block,
        context_width=c.cross_attention_dim,
        linear_projection=c.use_linear_projection,
    )


def shaken(network: Any) -> Any:
    """Norms with weights other than 1 and 0, so that a norm in the wrong place shows."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
    return network


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (5, 4), (16, 8)])
@pytest.mark.parametrize("kind", list(UNETS))
@torch.no_grad()
def test_unet(kind: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    reference = shaken(tiny.unet(**UNETS[kind]))
    config = unet_config(reference)
    ours = loaded(UNet(config), reference)
    x, context = rand(2, config.in_channels, *size), rand(2, 7, config.context_width, seed=1)
    timesteps = torch.tensor([3.0, 870.25])
    want = reference(x, timesteps, encoder_hidden_states=context).sample
    assert difference(ours(x, timesteps, context), want) < RELATIVE


# Autoencoder

VAES: dict[str, dict[str, Any]] = {
    "three levels": {},
    "two layers a block": {"layers_per_block": 2},
    "one level": {"block_out_channels": (32,)},
    "16 latent channels": {"latent_channels": 16},
    "8 groups": {"norm_num_groups": 8, "block_out_channels": (8, 16, 24, 40)},
}


def vae_config(reference: Any) -> AutoencoderConfig:
    c = reference.config
    return AutoencoderConfig(
        latent_channels=c.latent_channels,
        block_out_channels=tuple(c.block_out_channels),
        layers_per_block=c.layers_per_block,
        groups=c.norm_num_groups,
    )


@pytest.mark.parametrize("kind", list(VAES))
@torch.no_grad()
def test_autoencoder(kind: str) -> None:
    torch.manual_seed(0)
    reference = shaken(tiny.vae(**VAES[kind]))
    ours = loaded(Autoencoder(vae_config(reference)), reference)
    pictures = rand(2, 3, 32, 24).clamp(-1, 1)
    mean, log_variance = ours.encode(pictures)
    want = reference.encode(pictures).latent_dist
    assert difference(mean, want.mean) < RELATIVE
    assert difference(log_variance, want.logvar) < RELATIVE
    z = rand(*mean.shape, seed=1)
    assert difference(ours.decode(z), reference.decode(z).sample) < RELATIVE


@torch.no_grad()
def test_autoencoder_samples_its_latents() -> None:
    torch.manual_seed(0)
    reference = shaken(tiny.vae())
    ours = loaded(Autoencoder(vae_config(reference)), reference)
    pictures = rand(1, 3, 16, 16).clamp(-1, 1)
    noise = rand(1, 4, 4, 4, seed=0)
    drawn = reference.encode(pictures).latent_dist.sample(torch.Generator().manual_seed(0))
    picture, _, _ = ours(pictures, noise)
    assert difference(picture, reference.decode(drawn).sample) < RELATIVE


# Stable Diffusion 1.5


def test_true_sizes_have_the_published_numbers_of_parameters() -> None:
    """U-Net 859,520,964; text encoder 123,060,480; autoencoder 83,653,863 (the published SD 1.5 files)."""
    with torch.device("meta"):
        networks = (UNet(UNetConfig()), ClipText(ClipTextConfig()), Autoencoder(AutoencoderConfig()))
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts == [859_520_964, 123_060_480, 83_653_863]


@pytest.mark.slow
@torch.no_grad()
def test_unet_at_true_size() -> None:
    """860 M parameters, one evaluation on 32x32 latents; about 7 GB, because both share their weights."""
    torch.manual_seed(0)
    reference = tiny.diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64).eval()
    with torch.device("meta"):
        ours = UNet(UNetConfig())
    ours = loaded(ours, reference)
    x, context, timesteps = rand(1, 4, 32, 32), rand(1, 77, 768, seed=1), torch.tensor([981.0])
    want = reference(x, timesteps, encoder_hidden_states=context).sample
    assert difference(ours(x, timesteps, context), want) < RELATIVE


@pytest.mark.slow
@torch.no_grad()
def test_text_encoder_at_true_size() -> None:
    torch.manual_seed(0)
    reference = tiny.text_encoder(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        ours = ClipText(ClipTextConfig())
    ours = loaded(ours, reference, "text_model.")
    ids = torch.randint(0, 49406, (2, 77), generator=torch.Generator().manual_seed(0))
    assert difference(ours(ids), reference(ids).last_hidden_state) < RELATIVE


@pytest.mark.slow
@torch.no_grad()
def test_autoencoder_at_true_size() -> None:
    torch.manual_seed(0)
    reference = tiny.vae(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    with torch.device("meta"):
        ours = Autoencoder(AutoencoderConfig())
    ours = loaded(ours, reference)
    pictures, z = rand(1, 3, 256, 256).clamp(-1, 1), rand(1, 4, 32, 32, seed=1)
    want = reference.encode(pictures).latent_dist
    mean, log_variance = ours.encode(pictures)
    assert difference(mean, want.mean) < RELATIVE
    assert difference(log_variance, want.logvar) < RELATIVE
    assert difference(ours.decode(z), reference.decode(z).sample) < RELATIVE
