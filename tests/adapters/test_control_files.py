"""ControlNets in files: every layout, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reverie.adapters.control_files import ControlFile, open_control, save_control
from reverie.errors import CheckpointError
from reverie.families.base import Parts
from tests import tiny
from tests.adapters import controls as made
from tests.adapters.controls import assert_equal, of_family
from tests.checkpoint.hostile_pickles import Hostile


@pytest.mark.parametrize("prefix", ["", "control_model.", "controlnet."])
def test_original_layout(tmp_path: Path, sd1: Parts, net: Any, file: ControlFile, prefix: str) -> None:
    path = made.written(tmp_path / "a.safetensors", {prefix + n: t for n, t in made.original(net).items()})
    found = open_control(path, sd1)
    assert (found.kind, found.layout) == ("controlnet", "original")
    assert_equal(found.network, net.state_dict())
    assert found.network.control == file.network.control


def test_folder_without_a_doubt(root: Path, file: ControlFile, net: Any) -> None:
    assert (file.kind, file.layout, file.name, file.factor) == ("controlnet", "diffusers", "control", 4)
    assert_equal(file.network, net.state_dict())
    assert len(file.digest) == 64
    assert not any(p.requires_grad for p in file.network.parameters())


def test_file_of_a_folder_alone(root: Path, sd1: Parts, file: ControlFile) -> None:
    alone = open_control(root / "control" / "diffusion_pytorch_model.safetensors", sd1)
    assert_equal(alone.network, file.network.state_dict())
    assert alone.digest == file.digest
    assert alone.network.control == file.network.control


def test_torch_file_with_a_whole_model_beside(tmp_path: Path, sd1: Parts, net: Any) -> None:
    """As control_sd15_canny.pth is: read by the restricted reader, the model left out."""
    tensors = {f"control_model.{n}": t for n, t in made.original(net).items()}
    tensors |= {"model.diffusion_model.out.2.bias": torch.ones(4), "first_stage_model.x": torch.ones(2)}
    torch.save({"state_dict": tensors}, tmp_path / "control_sd15_canny.pth")
    assert_equal(open_control(tmp_path / "control_sd15_canny.pth", sd1).network, net.state_dict())


def test_difference(tmp_path: Path, sd1: Parts, net: Any) -> None:
    """What the U-Net has too is added to its weights; the rest is as it is."""
    base, names = sd1.unet.state_dict(), made.original(net)
    less = {
        f"control_model.{theirs}": names[theirs] - base[ours] if ours in base else names[theirs]
        for ours, theirs in zip(net.state_dict(), names, strict=True)
    }
    path = made.written(tmp_path / "diff_control.safetensors", less | {"difference": torch.zeros(0)})
    found = open_control(path, sd1)
    want = net.state_dict()
    for name, tensor in found.network.state_dict().items():
        assert torch.allclose(tensor, want[name], atol=1e-6)  # twice rounded
    assert any("difference" in claim for claim, _ in found.evidence)


def control_lora(net: Any, rank: int = 3) -> dict[str, Tensor]:
    """Factors for every weight of the copied part, its biases and all else in full."""
    torch.manual_seed(7)
    found = {"lora_controlnet": torch.zeros(0)}
    for name, tensor in made.original(net).items():
        path, _, leaf = name.rpartition(".")
        added = name.startswith(("zero_convs", "input_hint", "middle_block_out"))
        if added or leaf == "bias" or tensor.ndim == 1:
            found[name] = tensor
        else:
            found[f"{path}.up"] = torch.randn(len(tensor), rank, *(1 for _ in tensor.shape[2:]))
            found[f"{path}.down"] = torch.randn(rank, *tensor.shape[1:])
    return found


def test_control_lora(tmp_path: Path, sd1: Parts, net: Any) -> None:
    """`W + up down`, in float64; biases and what the U-Net has not as they are in the file."""
    tensors = control_lora(net)
    found = open_control(made.written(tmp_path / "a.safetensors", tensors), sd1)
    assert found.kind == "control-lora"
    base, ours = sd1.unet.state_dict(), found.network.state_dict()
    names = dict(zip(net.state_dict(), made.original(net), strict=True))
    changed = 0
    for name, tensor in ours.items():
        theirs = names[name]
        if theirs in tensors:
            assert torch.equal(tensor, tensors[theirs])
            continue
        up, down = (tensors[theirs.removesuffix("weight") + side].double() for side in ("up", "down"))
        product = torch.einsum("or,r...->o...", up.flatten(1), down)
        assert torch.allclose(tensor.double(), base[name].double() + product, atol=1e-5)
        changed += 1
    assert changed > 20
    assert_equal(sd1.unet, base)


def test_control_lora_keeps_what_it_does_not_name(tmp_path: Path, sd1: Parts, net: Any) -> None:
    tensors = {n: t for n, t in control_lora(net).items() if not n.startswith(("input_blocks.1", "middle_block.1"))}
    found = open_control(made.written(tmp_path / "a.safetensors", tensors), sd1).network.state_dict()
    base = sd1.unet.state_dict()
    kept = [n for n in found if n.startswith(("down_blocks.0.resnets.0.", "mid_block.attentions."))]
    assert kept
    assert all(torch.equal(found[name], base[name]) for name in kept)


def test_stability_layout(tmp_path: Path, root: Path, sd3: Parts) -> None:
    """The tokens of the noisy latents are made with the transformer's weights."""
    transformer = made.diffusers.SD3Transformer2DModel.from_pretrained(root / "sd3-without-t5" / "transformer")
    reference = made.sd3(transformer, **made.STABILITY)
    tensors = made.stability(reference)
    found = open_control(made.written(tmp_path / "a.safetensors", tensors), sd3)
    assert (found.kind, found.layout, found.canny) == ("sd3", "stability", False)
    base = {f"pos_embed.{n}": t for n, t in transformer.pos_embed.state_dict().items()}
    assert_equal(found.network, reference.state_dict() | base)
    canny = made.written(tmp_path / "b.safetensors", tensors | {"control_type": torch.tensor(1)})
    assert open_control(canny, sd3).canny
    save_control(tmp_path / "saved", found.network, torch.float32)
    assert_equal(made.diffusers.SD3ControlNetModel.from_pretrained(tmp_path / "saved"), reference.state_dict())
    assert_equal(open_control(tmp_path / "saved", sd3).network, found.network.state_dict())


@pytest.mark.parametrize("settings", [{"in_channels": 9}, {"guidance_width": 16}])
def test_nine_channels_and_told_scales_make_no_difference(
    root: Path, sd1: Parts, file: ControlFile, settings: dict[str, int]
) -> None:
    """An inpainting model, or one told the guidance scale, takes the ControlNets of its family."""
    found = open_control(root / "control", of_family(sd1, **settings))
    assert_equal(found.network, file.network.state_dict())


def test_smaller_middle_and_no_attention(tmp_path: Path, sd1: Parts) -> None:
    """As the published small ControlNets for SDXL are, from their header alone."""
    shape: dict[str, Any] = dict(tiny.XL) | {
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": 1,
    }  # fmt: skip
    network = made.control(tiny.unet(**shape))
    path = made.written(tmp_path / "small.safetensors", network.state_dict())
    xl = of_family(sd1, context_width=96, vector="add_embedding", vector_width=72, linear_projection=True)
    assert_equal(open_control(path, xl).network, network.state_dict())


# Refusals


def refused(path: Path, parts: Parts) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_control(path, parts)
    said = str(caught.value)
    assert "\n" not in said
    assert str(path) in said
    return said


def test_another_family(tmp_path: Path, root: Path, sd1: Parts, sd3: Parts, net: Any) -> None:
    wide = made.control(tiny.unet(cross_attention_dim=2048))
    path = made.written(tmp_path / "xl.safetensors", wide.state_dict())
    said = refused(path, of_family(sd1, context_width=768))
    assert "a ControlNet for Stable Diffusion XL, and this model is Stable Diffusion 1" in said
    odd = made.written(tmp_path / "odd.safetensors", made.control(tiny.unet(cross_attention_dim=77)).state_dict())
    assert "a prompt 77 wide, and this model has" in refused(odd, sd1)
    assert "this model is Stable Diffusion 3" in refused(path, sd3)
    transformer = made.diffusers.SD3Transformer2DModel.from_pretrained(root / "sd3-without-t5" / "transformer")
    other = made.written(tmp_path / "sd3.safetensors", made.sd3(transformer).state_dict())
    assert "a ControlNet for Stable Diffusion 3, and this model is Stable Diffusion 1" in refused(other, sd1)
    deep = of_family(sd1, layers_per_block=1)
    assert "1 residual blocks a level" in refused(made.written(tmp_path / "a.safetensors", net.state_dict()), deep)


def test_another_size_of_latents(tmp_path: Path, root: Path, sd1: Parts) -> None:
    network = made.control(
        made.diffusers.UNet2DConditionModel.from_pretrained(root / "sd1" / "unet"),
        conditioning_embedding_out_channels=(16, 32, 96, 256),
    )
    path = made.written(tmp_path / "a.safetensors", network.state_dict())
    assert "shown 8 pixels for each latent; this model's VAE has 4" in refused(path, sd1)


STRANGERS = {
    "lora_unet_down_blocks_0.lora_down.weight": "a LoRA",
    "down_blocks.0.lora_A.weight": "a LoRA",
    "adapter.body.0.resnets.0.block1.weight": "a T2I-Adapter",
    "ip_adapter.1.to_k_ip.weight": "an IP-Adapter",
    "model.diffusion_model.out.2.weight": "a model",
    "lllite_unet_input_blocks_4.conditioning1.0.weight": "a ControlNet-LLLite",
    "controlnet_x_embedder.weight": "a ControlNet for FLUX",
    "first_stage_model.encoder.conv_in.weight": "a VAE",
    "nothing.known": "something else",
}


@pytest.mark.parametrize("name", list(STRANGERS))
def test_no_controlnet(tmp_path: Path, sd1: Parts, name: str) -> None:
    path = made.written(tmp_path / "a.safetensors", {name: torch.ones(2, 2)})
    said = refused(path, sd1)
    assert f"no ControlNet for Stable Diffusion but {STRANGERS[name]}" in said
    assert name in said


def test_controlnet_xs_is_none(tmp_path: Path, sd1: Parts, net: Any) -> None:
    tensors = {n: t for n, t in net.state_dict().items() if not n.startswith("controlnet_mid")}
    path = made.written(tmp_path / "a.safetensors", tensors | {"down_connections.0.weight": torch.ones(2)})
    assert "a ControlNet-XS" in refused(path, sd1)


def test_broken_and_hostile_files(tmp_path: Path, sd1: Parts, net: Any) -> None:
    tensors = made.original(net)
    whole = made.written(tmp_path / "a.safetensors", tensors)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    assert "cut short" in refused(tmp_path / "cut.safetensors", sd1)
    bad = dict(tensors) | {"zero_convs.2.0.bias": torch.full_like(tensors["zero_convs.2.0.bias"], float("nan"))}
    assert "'zero_convs.2.0.bias' holds NaN" in refused(made.written(tmp_path / "nan.safetensors", bad), sd1)
    torch.save({"control_model.zero_convs.0.0.weight": Hostile(tmp_path / "mark")}, tmp_path / "evil.pth")
    refused(tmp_path / "evil.pth", sd1)
    assert not (tmp_path / "mark").exists()
    for name, shape in (("input_hint_block.0.weight", (0, 3, 3, 3)), ("input_blocks.0.0.weight", (9, 9)),
                        ("zero_convs.999999.0.weight", (1,)), ("input_hint_block.x.weight", (1,))):  # fmt: skip
        path = made.written(tmp_path / "absurd.safetensors", dict(tensors) | {name: torch.zeros(shape)})
        refused(path, sd1)
    less = {n: t for n, t in tensors.items() if n != "zero_convs.1.0.bias"}
    assert "1 tensor (controlnet_down_blocks.1.bias) missing" in refused(
        made.written(tmp_path / "less.safetensors", less), sd1
    )
    with pytest.raises(CheckpointError, match="no such file"):
        open_control(tmp_path / "nowhere.safetensors", sd1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        open_control(tmp_path / "empty", sd1)


def test_unknown_settings_of_a_folder(root: Path, tmp_path: Path, sd1: Parts, net: Any) -> None:
    net.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    for key, value in (("act_fn", "relu"), ("block_out_channels", [32, -1]), ("global_pool_conditions", "yes"),
                       ("controlnet_conditioning_channel_order", "gbr"), ("down_block_types", 3)):  # fmt: skip
        (tmp_path / "a" / "config.json").write_text(json.dumps(config | {key: value}))
        assert key in refused(tmp_path / "a", sd1)


@pytest.mark.parametrize("missing", ["input_blocks.1.0.in_layers.2.down", "input_blocks.1.0.in_layers.2.up"])
def test_half_a_control_lora(tmp_path: Path, sd1: Parts, net: Any, missing: str) -> None:
    tensors = control_lora(net)
    del tensors[missing]
    assert "Control-LoRA" in refused(made.written(tmp_path / "a.safetensors", tensors), sd1)


@pytest.mark.parametrize("shape", [(7, 3, 1, 1), (32, 2, 1, 1), (3,), ()])
def test_control_lora_of_another_model(tmp_path: Path, sd1: Parts, net: Any, shape: tuple[int, ...]) -> None:
    tensors = control_lora(net) | {"input_blocks.1.0.in_layers.2.up": torch.ones(shape)}
    assert "was made for another" in refused(made.written(tmp_path / "a.safetensors", tensors), sd1)


def test_difference_of_another_model(tmp_path: Path, sd1: Parts, net: Any) -> None:
    tensors = {f"control_model.{name}": t for name, t in made.original(net).items()} | {"difference": torch.zeros(0)}
    tensors["control_model.time_embed.0.weight"] = torch.ones(3, 3)
    assert "was made for another" in refused(made.written(tmp_path / "a.safetensors", tensors), sd1)
