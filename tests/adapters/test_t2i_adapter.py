"""T2I-Adapters and style adapters: opening, refusing, adding; against diffusers: tests/parity."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reverie.adapters.t2i_adapter import (
    FeatureControl,
    Place,
    StylePrompt,
    adapted,
    features,
    places,
    style_tokens,
    styled,
)
from reverie.adapters.t2i_adapter_file import open_t2i_adapter, t2i_config, t2i_json
from reverie.errors import CheckpointError, RequestError
from reverie.families import configs
from reverie.families.base import Parts
from reverie.nets.clip_text import quick_gelu
from reverie.nets.t2i_adapter import StyleAdapter, T2IAdapter, T2IAdapterConfig
from reverie.nets.unet import UNet
from reverie.sampling.guidance import Clock
from reverie.types import Cond, Taps
from tests import tiny
from tests.adapters import driving, sketched
from tests.families import published

CLOCK = Clock((10.0, 5.0, 2.0, 1.0, 0.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("t2i")


@pytest.fixture(scope="module")
def parts(root: Path) -> Parts:
    return driving.parts_of(tiny.model(root, "sd1", merges_kept=500))


def refused(expected: str, call: Callable[..., object], *args: object) -> None:
    with pytest.raises((CheckpointError, RequestError)) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    assert expected in str(caught.value)


# Features


def control(parts: Parts, size: tuple[int, int] = (48, 32), rows: int = 1, **settings: float) -> FeatureControl:
    torch.manual_seed(0)
    network = T2IAdapter(T2IAdapterConfig(widths=(32, 64), factor=4)).requires_grad_(False)
    assert isinstance(parts.unet, UNet)
    picture = torch.rand(rows, 3, *size, generator=torch.Generator().manual_seed(0))
    return FeatureControl(features(network, picture, parts.unet.config), **settings)


def predicted(parts: Parts, *controls: FeatureControl, strength: Tensor | None = None, **taps: Any) -> Tensor:
    cond = Cond(driving.rand(2, 7, 32, seed=1), control=strength, taps=Taps(**taps) if taps else None)
    return adapted(driving.predict_of(parts), controls, CLOCK)(driving.rand(2, 4, 12, 8), 5.0, cond)


def test_places_of_published_models() -> None:
    one, xl = (configs.unet_config(config) for config in (published.SD1, published.XL))
    assert places(one) == [
        Place("down_blocks.0", 320, 0), Place("down_blocks.1", 640, 1), Place("down_blocks.2", 1280, 2),
        Place("down_blocks.3", 1280, 3), Place("mid_block", 1280, 3),
    ]  # fmt: skip
    assert places(xl) == [
        Place("down_blocks.0.downsamplers", 320, 1), Place("down_blocks.1", 640, 1), Place("down_blocks.2", 1280, 2),
        Place("mid_block", 1280, 2),
    ]  # fmt: skip


def test_weight_zero_and_other_steps_leave_no_trace(parts: Parts) -> None:
    plain = predicted(parts)
    assert not torch.allclose(predicted(parts, control(parts)), plain, atol=1e-2)
    for off in (control(parts, weight=0.0), control(parts, start=0.5), control(parts, end=0.25)):
        assert torch.equal(predicted(parts, off), plain)
    assert torch.equal(predicted(parts, control(parts, end=0.5)), predicted(parts, control(parts)))


def test_two_add_up_in_any_order_and_with_taps_that_are_there(parts: Parts) -> None:
    one, other = control(parts, weight=0.25), control(parts, weight=0.5)
    both = predicted(parts, one, other)
    assert torch.allclose(both, predicted(parts, other, one), atol=1e-4)
    assert torch.allclose(both, predicted(parts, control(parts, weight=0.75)), atol=1e-4)
    there = {place.path: 0.5 * feature for place, feature in control(parts).features.items()}
    assert torch.allclose(both, predicted(parts, one, added=there), atol=1e-4)


def test_rows_that_are_controlled_less(parts: Parts) -> None:
    plain, all_rows = predicted(parts), predicted(parts, control(parts))
    got = predicted(parts, control(parts), strength=torch.tensor([0.0, 1.0]))
    assert torch.allclose(got[0], plain[0], atol=1e-4)
    assert torch.allclose(got[1], all_rows[1], atol=1e-4)


def test_a_row_for_each_picture(parts: Parts) -> None:
    """Two pictures, both under one condition: each with its own features."""
    both = predicted(parts, control(parts, rows=2))
    assert torch.allclose(both[0], predicted(parts, control(parts))[0], atol=1e-4)
    assert not torch.allclose(both[1], predicted(parts, control(parts))[1], atol=1e-2)


def test_a_part_of_the_picture_is_refused(parts: Parts) -> None:
    refused("makes a map of 8 x 8 where the drawing has 8 x 12", predicted, parts, control(parts, (32, 32)))


@pytest.mark.parametrize(("channels", "given"), [(1, 3), (3, 1), (1, 1)])
def test_grey_and_colour(parts: Parts, channels: int, given: int) -> None:
    """Grey as Pillow makes it; a grey picture is the same in all three colours."""
    torch.manual_seed(0)
    network = T2IAdapter(T2IAdapterConfig(channels=channels, widths=(32, 64), factor=4)).requires_grad_(False)
    assert isinstance(parts.unet, UNet)
    grey = torch.rand(1, 1, 48, 32)
    shown = grey.expand(-1, given, -1, -1)
    got = features(network, shown, parts.unet.config)
    for feature, want in zip(got.values(), network(grey.expand(-1, channels, -1, -1)), strict=True):
        assert torch.allclose(feature, want, atol=1e-5)
    refused(f"takes pictures of {channels} channels and was given 4", network, torch.ones(1, 4, 8, 8))


def test_odd_sides_are_continued() -> None:
    network = T2IAdapter(T2IAdapterConfig("full_adapter_xl", widths=(8, 8, 16, 16), factor=16)).requires_grad_(False)
    assert [f.shape[-2:] for f in network(torch.rand(1, 3, 40, 24))] == [(3, 2), (3, 2), (2, 1), (2, 1)]


# Files

# TencentARC's on the hub: t2iadapter_canny_sd15v2, t2iadapter_color_sd14v1 (light), t2i-adapter-lineart-sdxl-1.0.
TRUE_SIZES = {
    "full_adapter": ({"in_channels": 1, "channels": [320, 640, 1280, 1280], "downscale_factor": 8}, published.SD1),
    "light_adapter": ({"channels": [320, 640, 1280], "num_res_blocks": 4, "downscale_factor": 8}, published.SD1),
    "full_adapter_xl": ({"channels": [320, 640, 1280, 1280], "downscale_factor": 16}, published.XL),
}


@pytest.mark.parametrize("kind", list(TRUE_SIZES))
def test_names_at_true_size(kind: str) -> None:
    settings, unet = TRUE_SIZES[kind]
    config = t2i_config({"adapter_type": kind, **settings})
    with torch.device("meta"):
        ours, theirs = T2IAdapter(config), tiny.diffusers.T2IAdapter(adapter_type=kind, **settings)
    shapes = {f"adapter.{name}": t.shape for name, t in ours.state_dict().items()}
    assert shapes == {name: t.shape for name, t in theirs.state_dict().items()}
    assert list(config.widths) == [place.width for place in places(configs.unet_config(unet))][: len(config.widths)]
    assert t2i_config(t2i_json(config)) == config


def test_bad_files(parts: Parts, tmp_path: Path) -> None:
    path, good = tmp_path / "bad.safetensors", sketched.adapter("full_adapter", widths=[32, 64]).state_dict()

    def opened(tensors: dict[str, Tensor]) -> None:
        save_file(tensors, path)
        open_t2i_adapter(path, parts)

    opened(good)
    refused("this is no T2I-Adapter; the first of its tensors are x", opened, {"x": torch.ones(2)})
    refused("it takes 50 numbers a place; expected one of 16, 48, 64, 192", opened,
            good | {"adapter.conv_in.weight": torch.ones(32, 50, 3, 3)})  # fmt: skip
    missing = {name: t for name, t in good.items() if name != "adapter.body.1.resnets.0.block2.bias"}
    refused("1 tensor (body.1.resnets.0.block2.bias) missing", opened, missing)
    refused("1 tensor (body.0.skep.weight) not expected", opened, good | {"adapter.body.0.skep.weight": torch.ones(2)})


def test_an_adapter_of_another_family(parts: Parts, root: Path, tmp_path: Path) -> None:
    xl, path = sketched.adapter("full_adapter_xl"), tmp_path / "xl.safetensors"
    save_file(xl.state_dict(), path)
    refused("is a T2I-Adapter for Stable Diffusion XL (maps of 32 channels at 1/8", open_t2i_adapter, path, parts)
    xl.save_pretrained(tmp_path / "folder")
    refused("is a T2I-Adapter for Stable Diffusion XL", open_t2i_adapter, tmp_path / "folder", parts)
    other = driving.parts_of(tiny.sd3_model(root, "sd3-without-t5", merges_kept=500))
    refused("this model has a diffusion transformer", open_t2i_adapter, path, other)


# Style


class Reference(nn.Module):
    """The style adapter of torch's own layers: `TransformerEncoderLayer` with the norms first."""

    def __init__(self, tensors: dict[str, Tensor], heads: int) -> None:
        super().__init__()
        self.tensors = tensors
        width = tensors["proj"].shape[0]
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, quick_gelu, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        parts = {"attn": "self_attn", "ln_1": "norm1", "ln_2": "norm2", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
        named = {name.replace("transformer_layes", "layers"): t for name, t in tensors.items() if "layes" in name}
        for theirs, here in parts.items():
            named = {name.replace(f".{theirs}.", f".{here}."): t for name, t in named.items()}
        self.load_state_dict(named)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def forward(self, states: Tensor) -> Tensor:
        style = self.tensors["style_embedding"].expand(len(states), -1, -1)
        x = self.norm("ln_pre", torch.cat([states, style], dim=1))
        for layer in self.layers:
            x = layer(x)
        return self.norm("ln_post", x[:, -style.shape[1] :]) @ self.tensors["proj"]


@torch.no_grad()
def test_style(parts: Parts, tmp_path: Path) -> None:
    tensors = sketched.style(32)
    save_file(tensors, tmp_path / "style.safetensors")
    adapter = open_t2i_adapter(tmp_path / "style.safetensors", parts)
    assert isinstance(adapter, StyleAdapter)
    states = driving.rand(1, 9, 64)
    got = style_tokens(adapter, states)
    assert got.shape == (1, 5, 32)
    assert torch.allclose(got, Reference(tensors, heads=8)(states), atol=1e-5)


def test_style_of_another_width(parts: Parts, tmp_path: Path) -> None:
    save_file(sketched.style(48), tmp_path / "style.safetensors")
    refused(
        "style adapter for prompts 48 wide; this model's are 32",
        open_t2i_adapter,
        tmp_path / "style.safetensors",
        parts,
    )
    save_file(sketched.style(32), tmp_path / "style.safetensors")
    adapter = open_t2i_adapter(tmp_path / "style.safetensors", parts)
    refused("(CLIP ViT-L/14), the image encoder's have 80", style_tokens, adapter, torch.ones(1, 9, 80))


def test_a_styled_prompt_is_longer_and_so_is_the_negative_one() -> None:
    cond, style = Cond(driving.rand(2, 7, 32), vector=torch.ones(2, 3)), driving.rand(1, 5, 32, seed=1)
    prompt = StylePrompt(style, 0.5)
    positive, negative = styled(cond, prompt), styled(cond, prompt, negative=True)
    assert torch.equal(positive.context[:, :7], cond.context)
    assert torch.equal(positive.context[1, 7:], 0.5 * style[0])
    assert torch.equal(negative.context, torch.cat([cond.context, cond.context[:, -5:]], dim=1))
    assert positive.vector is cond.vector
