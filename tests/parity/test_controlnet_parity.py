"""ControlNets against diffusers: networks, names at true size, whole pictures.

Tolerance 1e-5 of the largest number for networks, as in test_nets; 1e-3 of [0, 1] for pictures, as in test_pictures
(largest difference seen: 1e-5).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import reverie
from reverie.adapters import control_names
from reverie.adapters.control_files import open_control, save_control
from reverie.engine.sources import data_url, to_picture
from reverie.families import configs
from reverie.families.base import Parts
from reverie.families.sd3.configs import transformer_config
from reverie.nets.controlnet import ControlNet, ControlNetConfig, widths_for
from reverie.nets.controlnet_sd3 import SD3ControlNet
from reverie.nets.mmdit import SD3_MEDIUM, SD35_LARGE
from reverie.nets.unet import UNet
from tests import tiny
from tests.adapters import controls as made
from tests.families import published
from tests.parity.test_nets import RELATIVE, difference, rand

diffusers = made.diffusers
PROMPT, NEGATIVE, SIZE = "a red apple on a table", "blurry", 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def loaded_unet(folder: Path) -> Any:
    return diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")


def parts_of(folder: Path) -> Parts:
    return reverie.load(folder, device="cpu", precision="float32").parts


def picture(seed: int = 0, size: int = SIZE) -> Tensor:
    """Of bytes, as files have them."""
    return torch.randint(0, 256, (1, 3, size, size), generator=torch.Generator().manual_seed(seed)) / 255


# Networks

KINDS = ("sd1", "sd2", "sdxl", "ssd-1b")
RECIPES: dict[str, Any] = {kind: tiny.RECIPES[kind].unet for kind in KINDS} | {
    "koala-with-middle": dict(tiny.RECIPES["koala"].unet) | {"mid_block_type": "UNetMidBlock2DCrossAttn"},
    "no attention": {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
                     "mid_block_type": "UNetMidBlock2D"},
}  # fmt: skip


def told(network: Any) -> tuple[dict[str, Any], Tensor | None]:
    """A vector as diffusers takes it, and ours."""
    c = network.config
    if c.addition_embed_type is None:
        return {}, None
    ids, pooled = 100 * rand(2, 6, seed=3).abs(), rand(2, 24, seed=2)
    sines = network.add_time_proj(ids.flatten()).reshape(2, -1)
    return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}, torch.cat([pooled, sines], dim=-1)


def assert_same(found: tuple[Tensor, ...], want: tuple[Any, Any]) -> None:
    every = [*want[0], want[1]]
    assert len(found) == len(every)
    for ours, theirs in zip(found, every, strict=True):
        assert difference(ours, theirs) < RELATIVE


def ours_of(network: Any) -> ControlNet:
    said = {k: list(v) if isinstance(v, tuple) else v for k, v in network.config.items()}
    found = ControlNet(control_names.json_config({**said, "_class_name": type(network).__name__}))
    found.load_state_dict(network.state_dict(), strict=True)
    return found.eval()


@pytest.mark.parametrize("settings", [{}, {"global_pool_conditions": True}, {"controlnet_conditioning_channel_order":
                         "bgr"}, {"conditioning_channels": 5}], ids=["plain", "pooled", "bgr", "channels"])  # fmt: skip
@pytest.mark.parametrize("kind", list(RECIPES))
@torch.no_grad()
def test_network(kind: str, settings: dict[str, Any]) -> None:
    """At a size that does not halve evenly."""
    torch.manual_seed(0)
    unet = tiny.unet(**RECIPES[kind])
    pooled = settings.get("global_pool_conditions", False)
    reference = made.control(unet, **{k: v for k, v in settings.items() if not k.startswith("global")})
    reference.register_to_config(global_pool_conditions=pooled)
    ours = ours_of(reference)
    given, vector = told(reference)
    x, context, shown = rand(2, 4, 9, 13), rand(2, 7, ours.config.context_width, seed=1), rand(2, 5, 36, 52)
    shown = shown[:, : settings.get("conditioning_channels", 3)]
    timesteps = torch.tensor([3.0, 870.25])
    want = reference(x, timesteps, context, shown, return_dict=False, **given)
    assert_same(ours(x, timesteps, context, ours.hint([shown]), vector=vector), want)


@pytest.mark.parametrize(("kinds", "weights"), [((3,), None), ((5, 0), (0.4, 1.3))], ids=["one", "two"])
@torch.no_grad()
def test_union(kinds: tuple[int, ...], weights: tuple[float, ...] | None) -> None:
    torch.manual_seed(0)
    reference = made.union(tiny.unet(**tiny.XL))
    ours = ours_of(reference)
    given, vector = told(reference)
    x, context = rand(2, 4, 8, 12), rand(2, 7, 96, seed=1)
    pictures = [rand(1, 3, 32, 48, seed=8 + i) for i in range(len(kinds))]
    types = torch.zeros(2, 6)
    types[:, list(kinds)] = 1
    want = reference(
        x, torch.tensor([3.0, 870.0]), context, [p.expand(2, -1, -1, -1) for p in pictures], types, list(kinds),
        list(weights or [1.0]), return_dict=False, **given,
    )  # fmt: skip
    hint = ours.hint(pictures, kinds, weights)
    assert_same(ours(x, torch.tensor([3.0, 870.0]), context, hint, vector=vector), want)


SD3: dict[str, dict[str, Any]] = {
    "joint": {}, "inpaint": {"extra_conditioning_channels": 1}, "dual": {"dual_attention_layers": (0,)},
    "told": {"force_zeros_for_pooled_projection": False}, "norms": {"qk_norm": "rms_norm"}, "alone": made.STABILITY,
}  # fmt: skip


@pytest.mark.parametrize("kind", list(SD3))
@torch.no_grad()
def test_network_of_sd3(kind: str) -> None:
    transformer = tiny.sd3_transformer("sd3")
    reference = made.sd3(transformer, **SD3[kind])
    base = transformer_config({**transformer.config, "_class_name": "SD3Transformer2DModel"})
    config = control_names.sd3_json_config({**reference.config}, base)
    ours = SD3ControlNet(config).eval()
    borrowed = {} if config.own_positions else {
        f"pos_embed.{n}": t for n, t in transformer.pos_embed.state_dict().items()
    }  # fmt: skip
    ours.load_state_dict(reference.state_dict() | borrowed, strict=True)
    x, context, vector = rand(2, 16, 8, 12), rand(2, 7, 112, seed=1), rand(2, 56, seed=2)
    shown, timesteps = rand(2, 17, 8, 12, seed=5)[:, : config.channels], torch.tensor([3.0, 870.0])
    want = reference(
        x if config.own_positions else transformer.pos_embed(x), shown, 1.0, context if config.joint else None,
        torch.zeros_like(vector) if config.zero_vector else vector, timesteps, return_dict=False,
    )[0]  # fmt: skip
    got = ours(x, timesteps, context, ours.hint(shown), vector=vector)
    for mine, theirs in zip(got, want, strict=True):
        assert difference(mine, theirs) < RELATIVE


# Names at true size

TRUE = {"stable-diffusion-v1-5": 361, "stable-diffusion-2-1": 364, "stable-diffusion-xl-base-1.0": 1251}
"""Millions of parameters: the files of lllyasviel/sd-controlnet-canny have 1.45 GB in float32, those of
diffusers/controlnet-canny-sdxl-1.0 have 2.5 GB in float16."""


@pytest.mark.parametrize("kind", list(TRUE))
def test_names_and_shapes_at_true_size(kind: str) -> None:
    with torch.device("meta"):
        reference = diffusers.ControlNetModel.from_unet(
            diffusers.UNet2DConditionModel(**published.UNETS[kind]), load_weights_from_unet=False
        )
        ours = ControlNet(ControlNetConfig(configs.unet_config(published.UNETS[kind])))
    shapes = {name: t.shape for name, t in reference.state_dict().items()}
    assert {name: t.shape for name, t in ours.state_dict().items()} == shapes
    assert round(sum(t.numel() for t in ours.state_dict().values()) / 1e6) == TRUE[kind]
    header = {name: tuple(shape) for name, shape in shapes.items()}
    assert control_names.control_config(header, configs.unet_config(published.UNETS[kind])) == ours.control
    written = control_names.to_json(ours.control)
    assert control_names.json_config(written) == ours.control
    with torch.device("meta"):
        again = diffusers.ControlNetModel.from_config({k: v for k, v in written.items() if k != "_class_name"})
    assert {name: t.shape for name, t in again.state_dict().items()} == shapes


def test_names_and_shapes_of_sd3_at_true_size() -> None:
    with torch.device("meta"):
        instantx = diffusers.SD3ControlNetModel(num_layers=6, num_attention_heads=24, caption_projection_dim=1536,
                                                pos_embed_max_size=192)  # fmt: skip
        stability = diffusers.SD3ControlNetModel(num_layers=19, num_attention_heads=38, **made.STABILITY)
    for reference, base in ((instantx, SD3_MEDIUM), (stability, SD35_LARGE)):
        shapes = {name: tuple(t.shape) for name, t in reference.state_dict().items()}
        config = control_names.sd3_config(shapes, base)
        with torch.device("meta"):
            ours = SD3ControlNet(config).state_dict()
        own = {n: tuple(t.shape) for n, t in ours.items() if config.own_positions or not n.startswith("pos_embed.")}
        assert own == shapes
        assert control_names.sd3_json_config({**reference.config}, base) == config


# Pictures


def drawn(folder: Path, *controls: dict[str, Any], **fields: Any) -> Tensor:
    """The engine's picture under control pictures."""
    model = reverie.load(folder, device="cpu", precision="float32")
    given: dict[str, Any] = {"width": SIZE, "height": SIZE, "steps": 6} | fields
    return model.generate(
        PROMPT, negative_prompt=NEGATIVE, seed=5, guidance_scale=4.0, controls=controls, **given
    ).pixels


def control(net: Path, seed: int = 0, size: int = SIZE, **settings: Any) -> dict[str, Any]:
    """What a request says of one; the picture is taken as it is."""
    shown = data_url(to_picture(picture(seed, size)))
    return {"kind": "canny", "picture": shown, "net": str(net), "preprocessor": "none"} | settings


def components(folder: Path) -> dict[str, Any]:
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, value in index.items() if value == [None, None]}
    found = dict(diffusers.DiffusionPipeline.from_pretrained(folder, **absent).components)
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    known = {name: value for name, value in settings.items() if name != "_diffusers_version"}
    return found | {"scheduler": tiny.scheduler_of(known)}


def pipeline(name: str, folder: Path, controlnet: Any = None, **parts: Any) -> Any:
    kept = {k: v for k, v in components(folder).items() if k not in {"image_encoder", "feature_extractor"}}
    extra = (
        {"feature_extractor": None, "requires_safety_checker": False} if "XL" not in name and "3" not in name else {}
    )
    own = {} if controlnet is None else {"controlnet": controlnet}
    pipe = getattr(diffusers, name)(**(kept | extra | own | parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference(pipe: Any, steps: int = 6, **options: Any) -> Tensor:
    result = pipe(PROMPT, negative_prompt=NEGATIVE, guidance_scale=4.0, generator=torch.Generator().manual_seed(5),
                  output_type="pt", num_inference_steps=steps, **options)  # fmt: skip
    found: Tensor = result.images.permute(0, 2, 3, 1).float()
    return found


@pytest.fixture(scope="module")
def sd1(root: Path) -> tuple[Path, list[Any]]:
    """A tiny Stable Diffusion 1 and two ControlNets, opened from a folder and from a file of the original layout."""
    folder = tiny.model(root, "sd1", merges_kept=500)
    settings = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
    tiny.scheduler_of(tiny.SCHEDULER | settings).save_pretrained(folder / "scheduler")
    nets = [made.control(loaded_unet(folder), seed) for seed in (3, 4)]
    nets[0].save_pretrained(root / "sd1-control")
    made.written(root / "sd1-control.safetensors", made.original(nets[1]))
    return folder, nets


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole": ({"strength": 0.7}, {"controlnet_conditioning_scale": 0.7}),
    "a part of the steps": ({"start": 0.2, "end": 0.7}, {"control_guidance_start": 0.2, "control_guidance_end": 0.7}),
    "guess mode": ({"mode": "guess"}, {"guess_mode": True}),
}


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_picture(root: Path, sd1: tuple[Path, list[Any]], kind: str) -> None:
    folder, nets = sd1
    ours, theirs = SETTINGS[kind]
    want = reference(pipeline("StableDiffusionControlNetPipeline", folder, nets[0]), image=picture(), **theirs)
    assert (drawn(folder, control(root / "sd1-control", **ours)) - want).abs().max() < 1e-3
    assert (drawn(folder) - want).abs().max() > 0.01


def test_two_at_once(root: Path, sd1: tuple[Path, list[Any]]) -> None:
    """One from a folder, one from a file of the original layout, each with weight, start and end of its own."""
    folder, nets = sd1
    want = reference(
        pipeline("StableDiffusionControlNetPipeline", folder, nets), image=[picture(0), picture(1)],
        controlnet_conditioning_scale=[0.6, 0.9], control_guidance_start=[0.0, 0.4],
        control_guidance_end=[0.5, 1.0],
    )  # fmt: skip
    first = control(root / "sd1-control", strength=0.6, end=0.5)
    second = control(root / "sd1-control.safetensors", 1, strength=0.9, start=0.4)
    assert (drawn(folder, first, second) - want).abs().max() < 1e-3


def test_pooled_answers(root: Path, sd1: tuple[Path, list[Any]], tmp_path: Path) -> None:
    """Shuffle: means, on the rows of the prompt alone."""
    folder, _ = sd1
    shuffle = made.control(loaded_unet(folder))
    shuffle.register_to_config(global_pool_conditions=True)
    path = made.written(tmp_path / "control_v11e_sd15_shuffle.safetensors", made.original(shuffle))
    want = reference(pipeline("StableDiffusionControlNetPipeline", folder, shuffle), image=picture())
    assert (drawn(folder, control(path)) - want).abs().max() < 1e-3


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8))


def test_image_to_image(root: Path, sd1: tuple[Path, list[Any]]) -> None:
    folder, nets = sd1
    pipe = pipeline("StableDiffusionControlNetImg2ImgPipeline", folder, nets[0])
    want = reference(pipe, image=photo(), control_image=picture(), strength=0.7, controlnet_conditioning_scale=0.8,
                     control_guidance_end=0.6)  # fmt: skip
    got = drawn(folder, control(root / "sd1-control", strength=0.8, end=0.6), image=photo(), strength=0.7)
    assert (got - want).abs().max() < 1e-3


def test_inpaint(root: Path, sd1: tuple[Path, list[Any]]) -> None:
    """The picture of an inpainting ControlNet is -1 where it is drawn anew."""
    folder, nets = sd1
    mask = Image.new("L", (SIZE, SIZE), 0)
    mask.paste(255, (8, 12, 28, 24))
    hidden = torch.from_numpy(np.asarray(mask, np.float32) / 255)[None, None]
    shown = torch.where(hidden > 0.5, -torch.ones(()), picture())
    pipe = pipeline("StableDiffusionControlNetInpaintPipeline", folder, nets[0])
    want = reference(pipe, image=photo(), mask_image=mask, control_image=shown, strength=1.0,
                     controlnet_conditioning_scale=1.0)  # fmt: skip
    follow = control(root / "sd1-control", kind="inpaint", preprocessor=None)
    got = drawn(folder, follow, image=photo(), mask=mask, strength=1.0, keep_unmasked=False)
    assert (got - want).abs().max() < 1e-3


@pytest.fixture(scope="module")
def sdxl(root: Path) -> Path:
    folder = tiny.model(root, "sdxl", merges_kept=500)
    network = made.control(loaded_unet(folder))
    network.save_pretrained(root / "sdxl-control")
    made.union(loaded_unet(folder)).save_pretrained(root / "sdxl-union")
    return folder


def test_picture_of_sdxl(root: Path, sdxl: Path) -> None:
    network = diffusers.ControlNetModel.from_pretrained(root / "sdxl-control")
    pipe = pipeline("StableDiffusionXLControlNetPipeline", sdxl, network)
    want = reference(pipe, image=picture(), controlnet_conditioning_scale=0.7)
    assert (drawn(sdxl, control(root / "sdxl-control", strength=0.7)) - want).abs().max() < 1e-3


@pytest.mark.parametrize("count", [1, 2])
def test_picture_of_a_union(root: Path, sdxl: Path, count: int) -> None:
    """Of two pictures, too, which it sees at once."""
    network = diffusers.ControlNetUnionModel.from_pretrained(root / "sdxl-union")
    pipe = pipeline("StableDiffusionXLControlNetUnionPipeline", sdxl, network)
    want = reference(pipe, control_image=[picture(0), picture(1)][:count], control_mode=[3, 1][:count],
                     controlnet_conditioning_scale=[0.7, 0.4][:count])  # fmt: skip
    first = control(root / "sdxl-union", kind="canny", strength=0.7)
    second = control(root / "sdxl-union", 1, kind="depth", strength=0.4)
    assert (drawn(sdxl, *(first, second)[:count]) - want).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["joint", "told", "alone"])
def test_picture_of_sd3(root: Path, tmp_path: Path, kind: str) -> None:
    """Without a prompt for the ControlNet, too, and from Stability's layout."""
    folder = tiny.sd3_model(root, "sd3-without-t5", merges_kept=500)
    parts = components(folder)
    network = made.sd3(parts["transformer"], **SD3[kind])
    if kind == "alone":
        path = made.written(tmp_path / "sd3.5_large_controlnet_depth.safetensors", made.stability(network))
    else:
        network.save_pretrained(path := tmp_path / "control")
    pipe = pipeline("StableDiffusion3ControlNetPipeline", folder, network)
    last = pipe.vae.encoder.conv_out  # diffusers samples the picture's latents; the deviation of these is near zero
    last.weight.data[16:], last.bias.data[16:] = 0, -60
    want = reference(pipe, control_image=2 * picture() - 1, controlnet_conditioning_scale=0.7)
    assert (drawn(folder, control(path, strength=0.7)) - want).abs().max() < 1e-3


# Training


def test_a_new_controlnet_equals_that_of_diffusers(root: Path, tmp_path: Path) -> None:
    """Copied from a U-Net it changes nothing yet, and what is written diffusers reads."""
    folder = tiny.model(root, "sd1", merges_kept=500)
    parts = parts_of(folder)
    assert isinstance(parts.unet, UNet)
    ours = ControlNet.from_unet(parts.unet, widths=widths_for(4))
    want = diffusers.ControlNetModel.from_unet(
        loaded_unet(folder), conditioning_embedding_out_channels=widths_for(4)
    ).state_dict()
    own = ours.state_dict()
    assert own.keys() == want.keys()
    copied = [name for name in own if not name.startswith("controlnet_cond_embedding.")]
    assert all(torch.equal(own[name], want[name]) for name in copied)
    save_control(tmp_path / "new", ours, torch.float32)
    read = diffusers.ControlNetModel.from_pretrained(tmp_path / "new").state_dict()
    assert read.keys() == own.keys()
    assert all(torch.equal(own[name], read[name]) for name in own)
    network = open_control(tmp_path / "new", parts).network
    assert isinstance(network, ControlNet)
    answers = network(rand(1, 4, 8, 8), torch.ones(1), rand(1, 7, 32), network.hint([picture()]))
    assert all(not t.any() for t in answers)


# True size


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_picture_at_true_size(tmp_path: Path) -> None:
    """Stable Diffusion 1.5 and its ControlNet with random weights, float32, 64x64 in 2 steps."""
    torch.manual_seed(0)
    text = tiny.text_encoder(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64).eval()
    vae = tiny.vae(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    settings = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
    plain = tiny.assembled(tmp_path, tiny.scheduler_of(tiny.SCHEDULER | settings), (text, unet, vae), 500)
    plain.save_pretrained(tmp_path / "model")
    network = made.control(unet, conditioning_embedding_out_channels=(16, 32, 96, 256))
    made.written(tmp_path / "control.safetensors", {f"control_model.{n}": t for n, t in made.original(network).items()})
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **plain.components, controlnet=network, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    want = reference(pipe, steps=2, image=picture(size=64), controlnet_conditioning_scale=0.8)
    del plain, pipe, network, unet, vae, text
    fields: dict[str, Any] = {"steps": 2, "width": 64, "height": 64}
    got = drawn(tmp_path / "model", control(tmp_path / "control.safetensors", size=64, strength=0.8), **fields)
    assert (got - want).abs().max() < 1e-3
    assert (drawn(tmp_path / "model", **fields) - want).abs().max() > 0.01
