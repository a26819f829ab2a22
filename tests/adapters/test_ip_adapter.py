"""Opening IP-Adapters, refusing what is none, and what a picture prompt does; against diffusers: tests/parity."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reverie.adapters.ip_adapter import (
    STYLE,
    WEIGHT_TYPES,
    ImagePrompt,
    area,
    image_encoder_for,
    image_prompted,
    read_faces,
    tokens,
)
from reverie.adapters.ip_adapter_file import IpAdapter, attention_order, open_ip_adapter, tokens_config
from reverie.errors import CheckpointError, RequestError
from reverie.families import configs
from reverie.families.base import Parts
from reverie.nets.clip_vision import ClipVision, ClipVisionConfig
from reverie.nets.image_tokens import ImagePromptNetwork
from reverie.nets.unet import UNet
from reverie.sampling.guidance import Clock
from reverie.types import Cond, Taps
from tests import tiny
from tests.adapters import driving, pictured
from tests.families import published

CLOCK = Clock((10.0, 5.0, 2.0, 1.0, 0.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ip")


@pytest.fixture(scope="module")
def parts(root: Path) -> Parts:
    return driving.parts_of(tiny.model(root, "sd1", merges_kept=500))


def file_for(parts: Parts, folder: Path, kind: str = "plain", name: str = "ip.safetensors", **settings: Any) -> Path:
    assert isinstance(parts.unet, UNet)
    return pictured.file_of(folder, name, pictured.tensors(kind, parts.unet, **settings))


@pytest.fixture(scope="module")
def adapter(root: Path, parts: Parts) -> IpAdapter:
    return open_ip_adapter(file_for(parts, root), parts)


def vision(**settings: int) -> ClipVision:
    torch.manual_seed(0)
    shape = {"width": 64, "inner_width": 96, "layers": 3, "heads": 4, "image_size": 28, "projection_width": 48}
    return ClipVision(ClipVisionConfig(**(shape | settings))).eval()  # type: ignore[arg-type]


def refused(expected: str, call: Callable[..., object], *args: object) -> None:
    with pytest.raises((CheckpointError, RequestError)) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    assert expected in str(caught.value)


# What a prompt does


def prompt_of(adapter: IpAdapter, **settings: Any) -> ImagePrompt:
    return ImagePrompt(adapter, driving.rand(1, 4, 32, seed=7), torch.zeros(1, 4, 32), **settings)


def predicted(parts: Parts, *prompts: ImagePrompt, sigma: float = 5.0, taps: Taps | None = None) -> Tensor:
    cond = Cond(driving.rand(2, 7, 32, seed=1), taps=taps, images=tuple(p.positive.expand(2, -1, -1) for p in prompts))
    predict = image_prompted(driving.predict_of(parts), prompts, CLOCK)
    return predict(driving.rand(2, 4, 12, 8), sigma, cond)


def test_weight_zero_and_other_steps_leave_no_trace(parts: Parts, adapter: IpAdapter) -> None:
    plain = predicted(parts)
    assert not torch.allclose(predicted(parts, prompt_of(adapter)), plain, atol=1e-3)
    assert torch.equal(predicted(parts, prompt_of(adapter, weight=0.0)), plain)
    assert torch.equal(predicted(parts, prompt_of(adapter, start=0.5)), plain)
    assert torch.equal(predicted(parts, prompt_of(adapter, end=0.25)), plain)
    assert not torch.allclose(predicted(parts, prompt_of(adapter, end=0.5)), plain, atol=1e-3)
    assert torch.equal(predicted(parts), plain)


def test_a_mask_of_all_is_none_and_one_of_nothing_is_no_picture(parts: Parts, adapter: IpAdapter) -> None:
    everywhere = predicted(parts, prompt_of(adapter, mask=torch.ones(1, 48, 32)))
    assert torch.allclose(everywhere, predicted(parts, prompt_of(adapter)), atol=1e-4)
    assert torch.allclose(
        predicted(parts, prompt_of(adapter, mask=torch.zeros(1, 48, 32))), predicted(parts), atol=1e-4
    )


def test_two_masks_divide_the_tokens(parts: Parts, adapter: IpAdapter) -> None:
    """Of two pictures the first acts alone where the second's mask is black."""
    both = ImagePrompt(
        adapter, driving.rand(1, 8, 32, seed=7), torch.zeros(1, 8, 32),
        mask=torch.stack([torch.ones(48, 32), torch.zeros(48, 32)]),
    )  # fmt: skip
    first = replace(both, positive=both.positive[:, :4], mask=None)
    assert torch.allclose(predicted(parts, both), predicted(parts, first), atol=1e-4)


def test_a_mask_is_resized_to_the_drawing() -> None:
    mask = area(pictured.picture().convert("L"), 32, 48)
    assert mask.shape == (1, 48, 32)
    assert set(mask.flatten().tolist()) == {0.0, 1.0}


def test_a_tap_of_guidance_sees_the_adapter_as_usual(parts: Parts, adapter: IpAdapter) -> None:
    """One that only looks on changes nothing; one that answers itself is heard."""
    seen: list[Tensor] = []

    def watching(module: nn.Module, x: Tensor, context: Tensor | None, usual: Callable[[], Tensor]) -> Tensor:
        seen.append(usual())
        return seen[-1]

    def silent(module: nn.Module, x: Tensor, context: Tensor | None, usual: Callable[[], Tensor]) -> Tensor:
        return torch.zeros_like(x)

    prompt = prompt_of(adapter)
    path = adapter.running[0]
    without = predicted(parts, prompt)
    assert torch.equal(predicted(parts, prompt, taps=Taps(attention={path: watching})), without)
    assert len(seen) == 1
    assert not torch.equal(predicted(parts, prompt, taps=Taps(attention={path: silent})), without)


# Weights by block


def test_weight_types(adapter: IpAdapter) -> None:
    """Six transformers in turn: two down, the middle, three up."""
    assert list(WEIGHT_TYPES) == [
        "linear", "ease in", "ease out", "ease in-out", "reverse in-out", "weak input", "weak middle", "weak output",
        "strong middle",
    ]  # fmt: skip

    def weights(name: str) -> list[float]:
        return [round(w, 4) for w in prompt_of(adapter, weight=2.0, weight_type=name).weights().values()]

    assert weights("linear") == [2.0] * 6
    assert weights("ease in") == [2.0, 1.6833, 1.3667, 1.05, 0.7333, 0.4167]
    assert weights("ease out") == [0.1, 0.4167, 0.7333, 1.05, 1.3667, 1.6833]
    assert weights("ease in-out") == [0.1, 0.7333, 1.3667, 2.0, 1.3667, 0.7333]
    assert weights("reverse in-out") == [2.0, 1.3667, 0.7333, 0.1, 0.7333, 1.3667]
    assert weights("weak input") == [0.4, 0.4, 2.0, 2.0, 2.0, 2.0]
    assert weights("weak middle") == [2.0, 2.0, 0.4, 2.0, 2.0, 2.0]
    assert weights("weak output") == [2.0, 2.0, 2.0, 0.4, 0.4, 0.4]
    assert weights("strong middle") == [0.4, 0.4, 2.0, 0.4, 0.4, 0.4]
    refused("unknown weight type 'ease'", weights, "ease")


def test_blocks_by_name(adapter: IpAdapter) -> None:
    weights = prompt_of(adapter, weight=0.5, blocks={"mid": 1.0, "up.1.2": 0.5}).weights()
    assert {path: weight for path, weight in weights.items() if weight} == {
        "mid_block.attentions.0.transformer_blocks.0.attn2": 0.5,
        "up_blocks.1.attentions.2.transformer_blocks.0.attn2": 0.25,
    }
    refused("no cross-attention layer 'up.0.1' in this network", prompt_of(adapter, blocks=STYLE).weights)


# Pictures to tokens


def test_several_pictures_one_after_the_other_or_their_mean(adapter: IpAdapter) -> None:
    pictures, encoder = [pictured.picture(1), pictured.picture(2)], vision()
    each = [tokens(adapter, encoder, [picture])[0] for picture in pictures]
    both, none = tokens(adapter, encoder, pictures)
    assert torch.allclose(both, torch.cat(each, dim=1), atol=1e-5)
    assert none.shape == both.shape == (1, 8, 32)
    mean, _ = tokens(adapter, encoder, pictures, average=True)
    assert mean.shape == (1, 4, 32)
    twice, _ = tokens(adapter, encoder, [pictures[0]] * 2, average=True)
    assert torch.allclose(twice, each[0], atol=1e-5)


def test_the_wrong_image_encoder(adapter: IpAdapter, parts: Parts, tmp_path: Path) -> None:
    see = [pictured.picture()]
    refused("needs a picture and an image encoder", tokens, adapter, None, see)
    refused("needs a picture and an image encoder", tokens, adapter, vision(), [])
    refused(
        "embeddings of 48 channels, the image encoder's have 768", tokens, adapter, vision(projection_width=768), see
    )
    plus = open_ip_adapter(file_for(parts, tmp_path, "plus"), parts)
    refused("states of 64 channels, the image encoder's have 32", tokens, plus, vision(width=32), see)


@pytest.mark.parametrize(
    ("kind", "source", "name"),
    [
        ("embedding", 1024, "CLIP ViT-H/14"), ("embedding", 1280, "CLIP ViT-bigG/14"),
        ("resampler", 1280, "CLIP ViT-H/14"), ("resampler", 1664, "CLIP ViT-bigG/14"),
        ("states", 1024, "CLIP ViT-L/14"),
    ],
)  # fmt: skip
def test_the_error_says_which_image_encoder_to_give(adapter: IpAdapter, kind: Any, source: int, name: str) -> None:
    config = replace(adapter.config, kind=kind, source=source, inner=8, feed=8, layers=1)
    wanting = replace(adapter, network=ImagePromptNetwork(config, {}))
    refused(f"give it {name} with encoder=FILE", tokens, wanting, vision(), [pictured.picture()])


def test_an_image_encoder_is_found_beside_or_in_the_library(parts: Parts, tmp_path: Path) -> None:
    tmp_path = tmp_path / "library" / "adapters"  # what lies around is looked at, too
    tmp_path.mkdir(parents=True)
    adapter = open_ip_adapter(file_for(parts, tmp_path, name="models.safetensors"), parts)
    refused("give an encoder of 48 channels with encoder=FILE", image_encoder_for, adapter.path, adapter.config)
    library = tmp_path / "clip_vision"
    library.mkdir()
    save_file(pictured.image_encoder(projection_dim=32).state_dict(), library / "a wrong one.safetensors")
    (library / "readme.txt").write_text("no weights")
    refused("no image encoder for models.safetensors", image_encoder_for, adapter.path, adapter.config, [library])
    save_file(pictured.image_encoder().state_dict(), library / "right.safetensors")
    assert image_encoder_for(adapter.path, adapter.config, [library]) == library / "right.safetensors"
    pictured.image_encoder().save_pretrained(tmp_path / "image_encoder")
    assert image_encoder_for(adapter.path, adapter.config, [library]) == tmp_path / "image_encoder"


def test_faces(parts: Parts, tmp_path: Path) -> None:
    face = open_ip_adapter(file_for(parts, tmp_path, "face", "faceid.bin"), parts)
    refused("Reverie does not compute it", tokens, face, None)
    refused("faces of shape [1, 511]", tokens, face, None, [], torch.zeros(1, 511))
    known, none = tokens(face, None, [], driving.rand(2, 512))
    assert known.shape == none.shape == (1, 8, 32)
    plus = open_ip_adapter(file_for(parts, tmp_path, "face_plus", "faceid-plus.bin"), parts)
    refused("takes 1 x 512", tokens, plus, vision(), [pictured.picture()], driving.rand(2, 512))
    for name, shape in (("one", (512,)), ("rows", (1, 512)), ("deep", (1, 1, 512))):
        save_file({"face": torch.ones(shape)}, tmp_path / f"{name}.safetensors")
        assert torch.equal(read_faces(tmp_path / f"{name}.safetensors"), torch.ones(1, 512))
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    refused("holds 2 tensors; expected one", read_faces, tmp_path / "two.safetensors")


def test_the_lora_of_faceid(parts: Parts, tmp_path: Path) -> None:
    """Four layers of every attention, by their paths; at strength 1 `up @ down` is added."""
    found = file_for(parts, tmp_path, "face", lora=True)
    adapter = open_ip_adapter(found, parts)
    assert isinstance(parts.unet, UNet)
    order = attention_order(parts.unet)
    assert adapter.lora is not None
    assert len(adapter.lora.deltas["unet"]) == 4 * len(order) == 4 * 12
    tensors = pictured.tensors("face", parts.unet, lora=True)
    path, start = f"{order[5]}.to_out.0", "ip_adapter.5.to_out_lora"
    weight = parts.unet.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    want = tensors[f"{start}.up.weight"] @ tensors[f"{start}.down.weight"]
    assert torch.allclose(adapter.lora.deltas["unet"][path].difference(weight, 1.0), want, atol=1e-5)
    assert path.endswith("attn2.to_out.0")


# Files


def test_numbers_of_layers_are_those_of_diffusers() -> None:
    for config in (published.SD1, published.XL):
        with torch.device("meta"):
            ours = UNet(configs.unet_config(config))
            theirs = tiny.diffusers.UNet2DConditionModel(**config)
        names = [name.removesuffix(".processor") for name in theirs.attn_processors]
        assert attention_order(ours) == names


@pytest.mark.parametrize(("config", "last"), [(published.SD1, 31), (published.XL, 139)])
def test_names_at_true_size(config: dict[str, Any], last: int) -> None:
    """Of h94/IP-Adapter's ip-adapter_sd15 and ip-adapter_sdxl: layers 1, 3, ... `last`, the middle's at the end."""
    with torch.device("meta"):
        unet = UNet(configs.unet_config(config))
        modules: Any = dict(unet.named_modules())
        order = attention_order(unet)
        widths = {str(n): modules[p].to_q.in_features for n, p in enumerate(order) if p.endswith("attn2")}
        shapes = {"proj.weight": (4 * unet.config.context_width, 1024), "norm.weight": (unet.config.context_width,)}
        spoken = tokens_config(shapes, Path("x"))
        network = ImagePromptNetwork(spoken, widths)
    names = set(network.state_dict())
    numbers = range(1, last + 1, 2)
    assert names == {f"ip_adapter.{n}.to_{part}_ip.weight" for n in numbers for part in "kv"} | {
        f"image_proj.{name}" for name in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
    }
    found = network.state_dict()
    assert found[f"ip_adapter.{last}.to_k_ip.weight"].shape == (1280, unet.config.context_width)
    assert found["ip_adapter.1.to_k_ip.weight"].shape[0] == (320 if last == 31 else 640)


# The resamplers of ip-adapter-plus_sd15 (12 heads of 64) and of ip-adapter-plus_sdxl_vit-h (20 heads).
@pytest.mark.parametrize(("inner", "width", "heads"), [(768, 768, 12), (1280, 2048, 20)])
def test_resampler_at_true_size(inner: int, width: int, heads: int) -> None:
    shapes = {
        "latents": (1, 16, inner), "proj_in.weight": (inner, 1280), "proj_out.weight": (width, inner),
        **{f"layers.{n}.0.to_q.weight": (64 * heads, inner) for n in range(4)},
        "layers.0.1.1.weight": (4 * inner, inner),
    }  # fmt: skip
    config = tokens_config(shapes, Path("plus.safetensors"))
    assert (config.heads, config.layers, config.tokens, config.source) == (heads, 4, 16, 1280)
    with torch.device("meta"):
        network = ImagePromptNetwork(config, {})
        theirs = tiny.diffusers.models.embeddings.IPAdapterPlusImageProjection(
            embed_dims=1280, output_dims=width, hidden_dims=inner, heads=heads, num_queries=16
        )
    count = sum(p.numel() for p in network.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())


def test_bad_files(parts: Parts, root: Path, tmp_path: Path) -> None:
    assert isinstance(parts.unet, UNet)
    path, good = tmp_path / "bad.safetensors", pictured.tensors("plain", parts.unet)

    def opened(tensors: dict[str, Tensor]) -> None:
        save_file(tensors, path)
        open_ip_adapter(path, parts)

    refused("is not an IP-Adapter: the first of its tensors is lora_unet_x", opened, {"lora_unet_x": torch.ones(2)})
    layers = {name: t for name, t in good.items() if name.startswith("ip_adapter")}
    refused("is not an IP-Adapter", opened, layers)
    refused("in a way that is not known: strange", opened, layers | {"image_proj.strange": torch.ones(2)})
    wide = {name: torch.ones(t.shape[0] * 2) if "norm" in name else t for name, t in good.items()}
    refused("IP-Adapter for prompts 64 wide; this model is for prompts 32 wide", opened, wide)
    refused("128 numbers are no tokens of 33 channels", opened, good | {"image_proj.norm.weight": torch.ones(33)})
    missing = {name: t for name, t in good.items() if name != "ip_adapter.11.to_v_ip.weight"}
    refused("1 tensor (ip_adapter.11.to_v_ip.weight) missing", opened, missing)
    more = good | {"ip_adapter.13.to_v_ip.weight": torch.ones(32, 32)}
    refused("1 tensor (ip_adapter.13.to_v_ip.weight) not expected", opened, more)
    half = good | {"ip_adapter.0.to_q_lora.down.weight": torch.ones(2, 32)}
    refused("belongs to no layer of this model, or its half is missing", opened, half)


def test_an_adapter_of_another_family(parts: Parts, root: Path, tmp_path: Path) -> None:
    """SDXL's on Stable Diffusion 1 and the other way round, at true widths of the prompt."""
    assert isinstance(parts.unet, UNet)
    tensors = {"image_proj.proj.weight": torch.ones(4 * 2048, 2), "image_proj.norm.weight": torch.ones(2048)}
    save_file(tensors, tmp_path / "xl.safetensors")
    with torch.device("meta"):
        narrow = replace(parts, unet=UNet(replace(parts.unet.config, context_width=768)))
    refused(
        "is an IP-Adapter for Stable Diffusion XL; this model is for Stable Diffusion 1",
        open_ip_adapter, tmp_path / "xl.safetensors", narrow,
    )  # fmt: skip
    other = driving.parts_of(tiny.sd3_model(root, "sd3-without-t5", merges_kept=500))
    refused("this model has a diffusion transformer", open_ip_adapter, tmp_path / "xl.safetensors", other)
