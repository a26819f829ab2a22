"""One model in every layout people have: the same weights bit for bit, and the picture of diffusers.

Tolerance of pictures: 1e-3 of [0, 1], as in test_pictures.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import reverie
from reverie.families import ldm as names
from reverie.nets.autoencoder import Autoencoder, AutoencoderConfig
from reverie.nets.unet import UNet, UNetConfig
from tests import tiny

SCHEDULER: dict[str, Any] = tiny.SCHEDULER | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
TEXT = "text_encoder/model.safetensors"

# The original names of Stable Diffusion 1's blocks, listed one by one from CompVis openaimodel.py.
SD1_BLOCKS = """
input_blocks.1.0 down_blocks.0.resnets.0
input_blocks.1.1 down_blocks.0.attentions.0
input_blocks.2.0 down_blocks.0.resnets.1
input_blocks.2.1 down_blocks.0.attentions.1
input_blocks.3.0.op down_blocks.0.downsamplers.0.conv
input_blocks.4.0 down_blocks.1.resnets.0
input_blocks.4.1 down_blocks.1.attentions.0
input_blocks.5.0 down_blocks.1.resnets.1
input_blocks.5.1 down_blocks.1.attentions.1
input_blocks.6.0.op down_blocks.1.downsamplers.0.conv
input_blocks.7.0 down_blocks.2.resnets.0
input_blocks.7.1 down_blocks.2.attentions.0
input_blocks.8.0 down_blocks.2.resnets.1
input_blocks.8.1 down_blocks.2.attentions.1
input_blocks.9.0.op down_blocks.2.downsamplers.0.conv
input_blocks.10.0 down_blocks.3.resnets.0
input_blocks.11.0 down_blocks.3.resnets.1
middle_block.0 mid_block.resnets.0
middle_block.1 mid_block.attentions.0
middle_block.2 mid_block.resnets.1
output_blocks.0.0 up_blocks.0.resnets.0
output_blocks.1.0 up_blocks.0.resnets.1
output_blocks.2.0 up_blocks.0.resnets.2
output_blocks.2.1.conv up_blocks.0.upsamplers.0.conv
output_blocks.3.0 up_blocks.1.resnets.0
output_blocks.3.1 up_blocks.1.attentions.0
output_blocks.4.0 up_blocks.1.resnets.1
output_blocks.4.1 up_blocks.1.attentions.1
output_blocks.5.0 up_blocks.1.resnets.2
output_blocks.5.1 up_blocks.1.attentions.2
output_blocks.5.2.conv up_blocks.1.upsamplers.0.conv
output_blocks.6.0 up_blocks.2.resnets.0
output_blocks.6.1 up_blocks.2.attentions.0
output_blocks.7.0 up_blocks.2.resnets.1
output_blocks.7.1 up_blocks.2.attentions.1
output_blocks.8.0 up_blocks.2.resnets.2
output_blocks.8.1 up_blocks.2.attentions.2
output_blocks.8.2.conv up_blocks.2.upsamplers.0.conv
output_blocks.9.0 up_blocks.3.resnets.0
output_blocks.9.1 up_blocks.3.attentions.0
output_blocks.10.0 up_blocks.3.resnets.1
output_blocks.10.1 up_blocks.3.attentions.1
output_blocks.11.0 up_blocks.3.resnets.2
output_blocks.11.1 up_blocks.3.attentions.2
"""


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.pipeline(tmp_path_factory.mktemp("pipe"), tiny.scheduler_of(SCHEDULER))


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "model"
    pipe.save_pretrained(path)
    return path


def reference(pipe: Any, steps: int = 5, size: int = 32) -> Tensor:
    result = pipe("a red apple", negative_prompt="blurry", num_inference_steps=steps, guidance_scale=5.0, height=size,
                  width=size, generator=torch.Generator().manual_seed(3), output_type="pt")  # fmt: skip
    pixels: Tensor = result.images.permute(0, 2, 3, 1).float()
    return pixels


def drawn(path: Path, steps: int = 5, size: int = 32, **options: Any) -> Tensor:
    model = reverie.load(path, device="cpu", precision="float32", **options)
    return model.generate(
        "a red apple", negative_prompt="blurry", steps=steps, guidance_scale=5.0, seed=3, width=size, height=size
    ).pixels


def weights(path: Path, **options: Any) -> dict[str, Tensor]:
    modules = reverie.load(path, device="cpu", precision="float32", **options).parts.modules()
    return {f"{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


def test_folder(pipe: Any, folder: Path) -> None:
    assert (drawn(folder) - reference(pipe)).abs().max() < 1e-3


def test_single_file(pipe: Any, folder: Path, tmp_path: Path) -> None:
    file = tiny.single_file(folder, tmp_path / "model.safetensors")
    assert_same_weights(weights(file), weights(folder))
    assert (drawn(file) - reference(pipe)).abs().max() < 1e-3


# Weights are views of mapped files, and small products sum in an order that depends on how a weight lies in memory:
# copied to aligned memory the same weights give the same bits.
LAST_BITS = 4e-6


def test_single_file_and_folder_draw_the_same(folder: Path, tmp_path: Path) -> None:
    file = tiny.single_file(folder, tmp_path / "model.safetensors")
    assert (drawn(file) - drawn(folder)).abs().max() < LAST_BITS


def test_single_file_without_the_level_text_model(folder: Path, tmp_path: Path) -> None:
    file = tiny.single_file(folder, tmp_path / "model.safetensors", prefix=False)
    assert_same_weights(weights(file), weights(folder))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_file_with_and_without_prefix(folder: Path, tmp_path: Path, prefix: str) -> None:
    """transformers 5 writes `embeddings...`, earlier versions `text_model.embeddings...`."""
    copied = copy_folder(folder, tmp_path / "model")
    bare = {name.removeprefix("text_model."): t for name, t in load_file(copied / TEXT).items()}
    (copied / TEXT).unlink()
    save_file({prefix + name: t.clone() for name, t in bare.items()}, copied / TEXT)
    assert_same_weights(weights(copied), weights(folder))


def copy_folder(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


@pytest.fixture(scope="module")
def halved(pipe: Any) -> Any:
    half = copy.copy(pipe)
    half.register_modules(**{part: copy.deepcopy(getattr(pipe, part)).half() for part in names_of_parts()})
    return half


def names_of_parts() -> tuple[str, ...]:
    return ("text_encoder", "unet", "vae")


def test_fp16_variant(halved: Any, tmp_path: Path) -> None:
    """The weights are float16, the arithmetic float32: as diffusers with the same weights widened."""
    halved.save_pretrained(tmp_path / "model", variant="fp16")
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    widened = copy.copy(halved)
    widened.register_modules(**{p: copy.deepcopy(getattr(halved, p)).float() for p in names_of_parts()})
    want = reference(widened)
    assert (drawn(tmp_path / "model", variant="fp16") - want).abs().max() < 1e-3
    assert (drawn(tmp_path / "model") - want).abs().max() < 1e-3  # the only variant there is


def test_variant_beside_the_plain_files(halved: Any, folder: Path, tmp_path: Path) -> None:
    both = copy_folder(folder, tmp_path / "model")
    halved.save_pretrained(both, variant="fp16")
    plain, variant = weights(both), weights(both, variant="fp16")
    assert_same_weights(plain, weights(folder))
    assert {t.dtype for t in variant.values()} == {torch.float16}
    assert_same_weights(variant, {name: t.half() for name, t in plain.items()})


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded(pipe: Any, halved: Any, folder: Path, tmp_path: Path, variant: str | None) -> None:
    source = halved if variant else pipe
    source.save_pretrained(tmp_path / "model", max_shard_size="200KB", variant=variant)
    assert len(list((tmp_path / "model" / "unet").glob("*-of-*.safetensors"))) > 2
    plain = weights(folder)
    want = {n: t.half() for n, t in plain.items()} if variant else plain
    assert_same_weights(weights(tmp_path / "model", variant=variant), want)
    if variant is None:
        assert (drawn(tmp_path / "model") - drawn(folder)).abs().max() < LAST_BITS


def test_sharded_variant_is_found_when_it_is_the_only_one(halved: Any, tmp_path: Path) -> None:
    halved.save_pretrained(tmp_path / "model", max_shard_size="200KB", variant="fp16")
    assert_same_weights(weights(tmp_path / "model"), weights(tmp_path / "model", variant="fp16"))


def test_fp16_single_file(halved: Any, folder: Path, tmp_path: Path) -> None:
    halved.save_pretrained(tmp_path / "half")
    file = tiny.single_file(folder, tmp_path / "model.safetensors", dtype=torch.float16)
    assert_same_weights(weights(file), weights(tmp_path / "half"))


def test_the_names_of_sd1_are_the_published_ones() -> None:
    """At true size, on the meta device: our table, the converter of the tests and the list above say the same."""
    with torch.device("meta"):
        unet = UNet(UNetConfig()).state_dict()
    blocks = dict(line.split()[::-1] for line in SD1_BLOCKS.split("\n") if line)
    table = names.unet_table(UNetConfig())
    for name in unet:
        theirs = names.rename(name, table)
        assert theirs == tiny.ldm_unet_name(name, unet)
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block:
            assert theirs is not None
            assert theirs.startswith(f"{blocks[block]}.")
    assert all(any(name.startswith(f"{block}.") for name in unet) for block in blocks)


def test_the_names_of_the_vae_are_the_published_ones() -> None:
    with torch.device("meta"):
        vae = Autoencoder(AutoencoderConfig()).state_dict()
    table = names.vae_table(AutoencoderConfig())
    assert {n: names.rename(n, table) for n in vae} == {n: tiny.ldm_vae_name(n, 4) for n in vae}
    # a few by hand: the decoder counts its levels backwards
    for ours, theirs in (
        ("decoder.up_blocks.0.resnets.2.conv1.weight", "decoder.up.3.block.2.conv1.weight"),
        ("decoder.up_blocks.2.upsamplers.0.conv.bias", "decoder.up.1.upsample.conv.bias"),
        ("encoder.down_blocks.1.resnets.0.conv_shortcut.weight", "encoder.down.1.block.0.nin_shortcut.weight"),
        ("encoder.mid_block.attentions.0.to_out.0.weight", "encoder.mid.attn_1.proj_out.weight"),
        ("decoder.mid_block.resnets.1.norm2.weight", "decoder.mid.block_2.norm2.weight"),
        ("post_quant_conv.weight", "post_quant_conv.weight"),
    ):
        assert names.rename(ours, table) == theirs


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_true_size_checkpoint(tmp_path: Path) -> None:
    """Stable Diffusion 1.5 with random weights, float16 folder and single file: one picture of 2 steps at 64x64.

    Peak memory about 9 GB: diffusers' copy and ours in float32, one after the other; 4.3 GB of files.
    """
    torch.manual_seed(0)
    text = tiny.text_encoder(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    unet = tiny.diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64).eval()
    vae = tiny.vae(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    for network in (text, unet, vae):
        network.half()
    pipe: Any = tiny.assembled(tmp_path, tiny.scheduler_of(SCHEDULER), (text, unet, vae))
    pipe.save_pretrained(tmp_path / "model")
    file = tiny.single_file(tmp_path / "model", tmp_path / "model.safetensors")
    for network in (text, unet, vae):
        network.float()
    want = reference(pipe, steps=2, size=64)
    del pipe, text, unet, vae
    assert (drawn(tmp_path / "model", steps=2, size=64) - want).abs().max() < 1e-3
    assert (drawn(file, steps=2, size=64) - want).abs().max() < 1e-3
