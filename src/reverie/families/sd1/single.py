"""A single safetensors file in the original (LDM) layout: the header decides the shape of every network."""

from collections.abc import Mapping
from itertools import count

from torch import Tensor

from reverie.checkpoint.load import build
from reverie.checkpoint.source import TensorInfo, WeightFile
from reverie.errors import CheckpointError
from reverie.families.sd1 import names
from reverie.nets.autoencoder import Autoencoder, AutoencoderConfig
from reverie.nets.clip_text import ClipText, ClipTextConfig
from reverie.nets.unet import UNet, UNetConfig

Header = Mapping[str, TensorInfo]

# What training leaves in a file and no picture needs: averaged copies, the noise schedule, old buffers.
IGNORED = (
    "model_ema.", "betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "logvar", "lvlb_weights",
    "first_stage_model.loss.", "cond_stage_model.logit_scale", "scale_factor", "global_step", "v_pred",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "cond_stage_model.transformer.embeddings.position_ids",
)  # fmt: skip
HEADS = 8  # CompVis v1-inference.yaml `num_heads`; shapes do not show it
GROUPS = 32  # CompVis `Normalize`, `normalization`
HEAD_WIDTH = 64  # of CLIP ViT-L/14


def looks_like(header: Header) -> bool:
    """Whether the header is that of a Stable Diffusion 1 file: an LDM U-Net and a transformers CLIP text encoder."""
    return f"{names.UNET}input_blocks.0.0.weight" in header and any(
        name.startswith(names.TEXT) and "token_embedding" in name for name in header
    )


def unet_config(header: Header) -> UNetConfig:
    """The U-Net's shape from its tensors' shapes."""
    widths: list[int] = []
    attention: list[bool] = []
    layers = 0
    shape = {name.removeprefix(names.UNET): t.shape for name, t in header.items() if name.startswith(names.UNET)}
    for k in count(1):
        block = f"input_blocks.{k}"
        if f"{block}.0.in_layers.2.weight" in shape:
            if not widths or f"input_blocks.{k - 1}.0.op.weight" in shape:
                widths.append(_need(shape, f"{block}.0.in_layers.2.weight")[0])
                attention.append(f"{block}.1.proj_in.weight" in shape)
            layers += len(widths) == 1
        elif f"{block}.0.op.weight" not in shape:
            break
    key = next((n for n in shape if n.endswith("attn2.to_k.weight")), None)
    if not widths or key is None:
        raise CheckpointError("the U-Net has no cross-attention; this is not a text-to-image Stable Diffusion file")
    return UNetConfig(
        in_channels=_need(shape, "input_blocks.0.0.weight")[1],
        out_channels=_need(shape, "out.2.weight")[0],
        block_out_channels=tuple(widths),
        attention=tuple(attention),
        heads=(HEADS,) * len(widths),
        layers_per_block=layers,
        context_width=shape[key][1],
        groups=GROUPS,
        linear_projection=len(_need(shape, "middle_block.1.proj_in.weight")) == 2,
    )


def vae_config(header: Header) -> AutoencoderConfig:
    """The autoencoder's shape from its tensors' shapes."""
    shape = {name.removeprefix(names.VAE): t.shape for name, t in header.items() if name.startswith(names.VAE)}
    widths: list[int] = []
    while f"encoder.down.{len(widths)}.block.0.conv1.weight" in shape:
        widths.append(shape[f"encoder.down.{len(widths)}.block.0.conv1.weight"][0])
    return AutoencoderConfig(
        in_channels=_need(shape, "encoder.conv_in.weight")[1],
        latent_channels=_need(shape, "post_quant_conv.weight")[0],
        block_out_channels=tuple(widths),
        layers_per_block=sum(f"encoder.down.0.block.{j}.conv1.weight" in shape for j in range(8)),
        groups=GROUPS,
    )


def text_config(header: Header) -> ClipTextConfig:
    """The text encoder's shape from its tensors' shapes."""
    shape = {_text_name(name): t.shape for name, t in header.items() if name.startswith(names.TEXT)}
    vocab_size, width = _need(shape, "text_model.embeddings.token_embedding.weight")
    layers = sum(name.endswith("layer_norm1.weight") for name in shape)
    return ClipTextConfig(
        vocab_size=vocab_size,
        width=width,
        inner_width=_need(shape, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        layers=layers,
        heads=max(width // HEAD_WIDTH, 1),
        positions=_need(shape, "text_model.embeddings.position_embedding.weight")[0],
    )


def load_networks(file: WeightFile) -> tuple[ClipText, UNet, Autoencoder]:
    """The three networks, mapped.

    Raises:
        CheckpointError: missing, unexpected or wrongly shaped tensors.
    """
    header = {n: t for n, t in file.tensors.items() if not n.startswith(IGNORED)}
    text_shape, unet_shape, vae_shape = text_config(header), unet_config(header), vae_config(header)
    unet_names, vae_names = (
        names.inverse(names.unet_table(unet_shape)),
        names.inverse(names.vae_table(vae_shape)),
    )
    parts: dict[str, dict[str, Tensor]] = {"text_encoder": {}, "unet": {}, "vae": {}}
    strangers = []
    for name in header:
        part, ours = _ours(name, unet_names, vae_names)
        if part and ours:
            parts[part][ours] = file.tensor(name)
        else:
            strangers.append(name)
    if strangers:
        raise CheckpointError(
            f"{file.path} has {len(strangers)} tensors that Stable Diffusion 1 has not: {strangers[0]}, ..."
        )
    where = f"in {file.path}"
    return (
        build(lambda: ClipText(text_shape), parts["text_encoder"], f"the text encoder {where}"),
        build(lambda: UNet(unet_shape), parts["unet"], f"the U-Net {where}"),
        build(lambda: Autoencoder(vae_shape), _linear_attention(parts["vae"]), f"the VAE {where}"),
    )


def _ours(name: str, unet: Mapping[str, str], vae: Mapping[str, str]) -> tuple[str, str | None]:
    if name.startswith(names.UNET):
        return "unet", names.rename(name.removeprefix(names.UNET), unet)
    if name.startswith(names.VAE):
        return "vae", names.rename(name.removeprefix(names.VAE), vae)
    if name.startswith(names.TEXT):
        return "text_encoder", _text_name(name)
    return "", None


def _text_name(name: str) -> str:
    """Some files lack the level `text_model`."""
    short = name.removeprefix(names.TEXT)
    return short if short.startswith("text_model.") else f"text_model.{short}"


def _linear_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """LDM writes the VAE's attention as 1x1 convolutions; ours are linear. A view, not a copy."""
    return {n: t.flatten(1) if ".attentions." in n and t.ndim == 4 else t for n, t in tensors.items()}


def _need(shape: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if name not in shape:
        raise CheckpointError(f"tensor {name} is missing; a Stable Diffusion 1 file has it")
    return shape[name]
