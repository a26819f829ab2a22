"""ControlNets of diffusers with random weights, in every published layout.

What makes them calls none of Reverie's own tables or readers.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import reverie
from reverie.families.base import Parts
from reverie.nets.unet import UNet
from tests import tiny

diffusers: Any = import_module("diffusers")
WIDTHS = (16, 24, 32)  # of the picture's network: four pixels a latent, as the tiny VAE has


def shaken(network: Any, seed: int = 3) -> Any:
    """The network with numbers where it is zero, or its answers would be."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return network.eval()


def control(unet: Any, seed: int = 3, **settings: Any) -> Any:
    """A ControlNet for a U-Net of diffusers."""
    own = {"conditioning_embedding_out_channels": WIDTHS} | settings
    network = diffusers.ControlNetModel.from_unet(unet, **own)
    return shaken(network, seed)


def union(unet: Any, seed: int = 3) -> Any:
    """A Union for a U-Net of SDXL."""
    c = unet.config
    torch.manual_seed(seed)
    network = diffusers.ControlNetUnionModel(
        down_block_types=c.down_block_types, block_out_channels=c.block_out_channels,
        layers_per_block=c.layers_per_block, cross_attention_dim=c.cross_attention_dim,
        transformer_layers_per_block=c.transformer_layers_per_block, attention_head_dim=c.attention_head_dim,
        use_linear_projection=c.use_linear_projection, addition_embed_type=c.addition_embed_type,
        addition_time_embed_dim=c.addition_time_embed_dim, num_trans_channel=c.block_out_channels[0],
        projection_class_embeddings_input_dim=c.projection_class_embeddings_input_dim,
        num_proj_channel=c.block_out_channels[0], conditioning_embedding_out_channels=WIDTHS, num_trans_layer=2,
    )  # fmt: skip
    return shaken(network, seed)


def sd3(transformer: Any, seed: int = 3, **settings: Any) -> Any:
    """A ControlNet for a transformer of diffusers."""
    c = transformer.config
    torch.manual_seed(seed)
    shape = {
        "sample_size": c.sample_size, "patch_size": c.patch_size, "in_channels": c.in_channels, "num_layers": 2,
        "attention_head_dim": c.attention_head_dim, "num_attention_heads": c.num_attention_heads,
        "joint_attention_dim": c.joint_attention_dim, "caption_projection_dim": c.caption_projection_dim,
        "pooled_projection_dim": c.pooled_projection_dim, "pos_embed_max_size": c.pos_embed_max_size,
        "qk_norm": c.qk_norm,
    }  # fmt: skip
    return shaken(diffusers.SD3ControlNetModel(**shape | settings), seed)


STABILITY: dict[str, Any] = {
    "joint_attention_dim": None, "use_pos_embed": False, "force_zeros_for_pooled_projection": False,
    "pos_embed_max_size": None, "qk_norm": None,
}  # fmt: skip
"""What Stability's ControlNets for 3.5 large have otherwise."""


def original(network: Any) -> dict[str, Tensor]:
    """The tensors of a ControlNet for a U-Net under lllyasviel's names, without the prefix."""
    tensors = network.state_dict()
    blocks = len([name for name in tensors if name.startswith("controlnet_cond_embedding.blocks.")]) // 2
    outside = {"controlnet_mid_block": "middle_block_out.0", "controlnet_cond_embedding.conv_in": "input_hint_block.0",
               "controlnet_cond_embedding.conv_out": f"input_hint_block.{2 * blocks + 2}"}  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        start, _, number = module.rpartition(".")
        if module in outside:
            found[f"{outside[module]}.{leaf}"] = tensor
        elif start == "controlnet_down_blocks":
            found[f"zero_convs.{number}.0.{leaf}"] = tensor
        elif start == "controlnet_cond_embedding.blocks":
            found[f"input_hint_block.{2 + 2 * int(number)}.{leaf}"] = tensor
        else:
            found[tiny.ldm_unet_name(name, tensors)] = tensor
    return found


def stability(network: Any) -> dict[str, Tensor]:
    """The tensors of a ControlNet for 3.5 large under Stability's names."""
    names = {"attn.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
             "norm1.linear": "adaLN_modulation.1"}  # fmt: skip
    found: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)  # noqa: PLW2901
        if ".attn.to_q." in name:
            own = network.state_dict()
            parts = [own[name.replace("to_q", f"to_{letter}")] for letter in "qkv"]
            found[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".attn.to_" not in name:
            found[name] = tensor
    return found


def written(path: Path, tensors: dict[str, Tensor]) -> Path:
    """A safetensors file."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    return path


SIZE = 32


def parts_of(folder: Path) -> Parts:
    """The networks of a model."""
    return reverie.load(folder, device="cpu", precision="float32").parts


def of_family(parts: Parts, **settings: Any) -> Parts:
    """The same model with another U-Net, which has no weights."""
    assert isinstance(parts.unet, UNet)
    with torch.device("meta"):
        return replace(parts, unet=UNet(replace(parts.unet.config, **settings)))


def sd1_control(root: Path) -> Any:
    """A ControlNet of diffusers for the tiny Stable Diffusion 1, written to `root / "control"`."""
    network = control(diffusers.UNet2DConditionModel.from_pretrained(root / "sd1" / "unet"))
    network.save_pretrained(root / "control")
    return network


def picture(seed: int = 0, size: int = SIZE, count: int = 1) -> Tensor:
    """A control picture `(count, 3, size, size)`."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def assert_equal(found: nn.Module, want: Mapping[str, Tensor]) -> None:
    """The network has these tensors and no others."""
    own = found.state_dict()
    assert own.keys() == want.keys()
    assert all(torch.equal(own[name], want[name]) for name in own)
