"""The published models at true size, on the meta device: names, shapes and configs, from JSON and from headers."""

from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reverie.families import configs, ldm, shapes
from reverie.families.pieces import tidied_clip
from reverie.families.sd3 import configs as sd3
from reverie.nets.autoencoder import SD3_AUTOENCODER, Autoencoder, AutoencoderConfig
from reverie.nets.clip_text import ClipText, ClipTextConfig
from reverie.nets.mmdit import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from reverie.nets.t5 import T5Config
from reverie.nets.unet import UNet, UNetConfig
from tests import tiny
from tests.families import published

diffusers: Any = import_module("diffusers")
transformers: Any = import_module("transformers")
Shapes = dict[str, tuple[int, ...]]


def shapes_of(network: nn.Module) -> Shapes:
    return {name: tuple(t.shape) for name, t in network.state_dict().items()}


def on_meta(make: Any, *args: Any, **settings: Any) -> Any:
    with torch.device("meta"):
        return make(*args, **settings)


@cache
def ours(model: str) -> UNet:
    """Built once; nobody changes it."""
    network: UNet = on_meta(UNet, configs.unet_config(published.UNETS.get(model, published.LCM)))
    return network


@pytest.mark.parametrize("model", [*published.UNETS, "lcm"])
def test_unet(model: str) -> None:
    """The network of the JSON has diffusers' names and shapes, and these tell the same config as the JSON."""
    json = published.UNETS.get(model, published.LCM)
    config = configs.unet_config(json)
    want = shapes_of(on_meta(diffusers.UNet2DConditionModel, **json))
    assert shapes_of(ours(model)) == want
    assert shapes.unet_config(want) == config


@pytest.mark.parametrize("model", list(published.UNETS))
def test_unet_in_the_original_layout(model: str) -> None:
    """The header alone tells the config; names there and back are those of the tests' own map."""
    config = configs.unet_config(published.UNETS[model])
    unet = ours(model).state_dict()
    file = {tiny.ldm_unet_name(name, unet): t for name, t in unet.items()}
    assert len(file) == len(unet)
    header = {name: tuple(t.shape) for name, t in file.items()}
    assert ldm.unet_config(header, "class_embedding" if "unclip" in model else "add_embedding") == config
    back, theirs = ldm.unet_from_file(file, config), ldm.unet_to_file(unet, config)
    assert back.keys() == unet.keys()
    assert all(back[name] is t for name, t in unet.items())
    assert theirs.keys() == file.keys()
    assert all(theirs[name] is t for name, t in file.items())


@pytest.mark.parametrize("model", list(published.PARAMETERS))
def test_numbers_of_parameters(model: str) -> None:
    millions = sum(p.numel() for p in ours(model).parameters()) / 1e6
    assert millions == pytest.approx(published.PARAMETERS[model], rel=0.025)


@pytest.mark.parametrize("model", list(published.UNETS))
def test_unet_json_and_back(model: str) -> None:
    config = configs.unet_config(published.UNETS[model])
    assert configs.unet_config(configs.unet_json(config)) == config


@pytest.mark.parametrize(
    "model", ["SSD-1B", "koala-700m", "stable-diffusion-x4-upscaler", "stable-diffusion-2-1-unclip"]
)
def test_diffusers_reads_the_json_that_we_write(model: str) -> None:
    json = configs.unet_json(ours(model).config)
    json.pop("_class_name")
    assert shapes_of(on_meta(diffusers.UNet2DConditionModel, **json)) == shapes_of(ours(model))


@pytest.mark.parametrize("model", list(published.VAES))
def test_vae(model: str) -> None:
    json = published.VAES[model]
    config = configs.vae_config(json)
    vae = on_meta(Autoencoder, config)
    assert shapes_of(vae) == shapes_of(on_meta(diffusers.AutoencoderKL, **json))
    assert configs.vae_config(configs.vae_json(config)) == config
    header = {tiny.ldm_vae_name(n, len(config.block_out_channels)): s for n, s in shapes_of(vae).items()}
    seen = ldm.vae_config(header)
    said = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # what no shape shows
    assert {k: v for k, v in vars(seen).items() if k not in said} == {
        k: v for k, v in vars(config).items() if k not in said
    }
    assert shapes.vae_config(shapes_of(vae)) == seen


def test_vae_of_sd3_is_the_published_one() -> None:
    assert configs.vae_config(published.VAES["stable-diffusion-3-medium-diffusers"]) == SD3_AUTOENCODER
    assert configs.vae_config(published.VAES["stable-diffusion-v1-5"]) == AutoencoderConfig()


TEXTS: dict[str, tuple[dict[str, Any], bool]] = {
    "CLIP-L": (published.CLIP_L, False),
    "CLIP-L with projection": (published.CLIP_L, True),
    "OpenCLIP-H": (published.OPEN_CLIP_H, False),
    "OpenCLIP-G": (published.OPEN_CLIP_G, True),
}


@pytest.mark.parametrize("kind", list(TEXTS))
def test_text_encoder(kind: str) -> None:
    json, projected = TEXTS[kind]
    config = configs.text_config(json, projected=projected)
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    reference = on_meta(getattr(transformers, name), transformers.CLIPTextConfig(**json))
    want = shapes_of(on_meta(ClipText, config))
    assert tidied_clip(shapes_of(reference)) == want
    assert shapes.clip_config(want, config.activation) == config
    assert configs.text_config(configs.text_json(config), projected=projected) == config


def test_clip_l_is_the_default() -> None:
    assert configs.text_config(published.CLIP_L) == ClipTextConfig()


@pytest.mark.parametrize(("json", "projected"), [(published.OPEN_CLIP_H, False), (published.OPEN_CLIP_G, True)])
def test_text_encoder_in_the_layout_of_open_clip(json: dict[str, Any], projected: bool) -> None:
    config = configs.text_config(json, projected=projected)
    text = on_meta(ClipText, config).state_dict()
    file = tiny.open_clip_tensors(text)
    assert ldm.open_clip_config({name: tuple(t.shape) for name, t in file.items()}) == config
    read = ldm.open_clip_from_file(file, config)
    assert {name: t.shape for name, t in read.items()} == {name: t.shape for name, t in text.items()}
    back = ldm.open_clip_to_file(read, config)
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in file.items()}


@pytest.mark.parametrize(
    ("model", "config"),
    list(zip(published.TRANSFORMERS, (SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM), strict=True)),
)
def test_transformer(model: str, config: object) -> None:
    """That the networks of these configs have diffusers' names and shapes is tests/parity/test_sd3_nets.py's matter."""
    json = published.TRANSFORMERS[model]
    assert sd3.transformer_config(json) == config
    assert sd3.transformer_config(sd3.transformer_json(sd3.transformer_config(json))) == config
    known = dict(on_meta(diffusers.SD3Transformer2DModel, **json | {"num_layers": 1}).config)
    assert sd3.transformer_json(sd3.transformer_config(json)).keys() - {"_class_name"} <= known.keys()  # it reads them


def test_t5() -> None:
    assert sd3.t5_config(published.T5) == T5Config()
    json = sd3.t5_json(T5Config())
    assert sd3.t5_config(json) == T5Config()
    read = transformers.T5Config(**json)
    assert (read.d_model, read.d_ff, read.num_heads, read.dense_act_fn, read.is_gated_act) == (
        4096, 10240, 64, "gelu_new", True,
    )  # fmt: skip


def test_defaults_of_a_config_are_those_of_diffusers() -> None:
    """An empty JSON is what diffusers builds of nothing, but for its width of the prompt."""
    assert configs.unet_config({}) == UNetConfig(context_width=1280)
    want = shapes_of(on_meta(diffusers.UNet2DConditionModel))
    assert shapes_of(on_meta(UNet, configs.unet_config({}))) == want


def test_views_not_copies() -> None:
    """Queries, keys, values and the transposed projection of an OpenCLIP file are views of it."""
    config = ClipTextConfig(vocab_size=9, width=64, inner_width=32, layers=2, heads=1, projection_width=16)
    torch.manual_seed(0)
    file: dict[str, Tensor] = tiny.open_clip_tensors(ClipText(config).state_dict())
    storages = {t.untyped_storage().data_ptr() for t in file.values()}
    read = ldm.open_clip_from_file(file, config)
    assert {t.untyped_storage().data_ptr() for t in read.values()} == storages
