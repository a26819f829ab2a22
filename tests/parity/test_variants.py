"""Models that are shown or told a picture, against the pipelines of diffusers: depth, x4 upscaler, unCLIP.

Each from the folder and from the single file. Tolerance: 1e-3 of [0, 1] on float32 pixels, as in test_pictures.py.
"""

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import reverie
from reverie.engine.doctor import examine
from reverie.errors import RequestError
from tests import tiny
from tests.tiny import diffusers, transformers

PROMPT, NEGATIVE = "a red apple on a table", "blurry"
COMMON: dict[str, Any] = {"negative_prompt": NEGATIVE, "guidance_scale": 4.0}
LAYOUTS = ("folder", "file")
WIDTH = 12  # of the picture's embedding


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def picture(seed: int = 0, size: tuple[int, int] = (48, 32)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise)


def pixels(result: Any) -> Tensor:
    found: Tensor = result.images.permute(0, 2, 3, 1).float()
    return found


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def parts_of(root: Path, kind: str) -> dict[str, Any]:
    """The networks and the tokenizer of a folder, for a pipeline that wants more than it holds."""
    folder = tiny.model(root, kind)
    return {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": tiny.scheduler_of(tiny.RECIPES[kind].scheduler),
    }


def quiet(pipe: Any) -> Any:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def model(path: Path) -> reverie.Model:
    return reverie.load(path, device="cpu", precision="float32")


# Depth


def depth_map(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A slope with a step in it, not from black to white."""
    across = np.linspace(40, 200, size[0], dtype=np.float32)[None].repeat(size[1], 0)
    across[size[1] // 2 :, size[0] // 3 :] -= 30
    return Image.fromarray(across.round().astype(np.uint8))


@cache
def depth_pipeline(root: Path) -> Any:
    return quiet(
        diffusers.StableDiffusionDepth2ImgPipeline(
            **parts_of(root, "sd2-depth"), depth_estimator=None, feature_extractor=None
        )
    )


def depth_model(root: Path, layout: str) -> reverie.Model:
    return model(tiny.model(root, "sd2-depth") if layout == "folder" else tiny.model_file(root, "sd2-depth"))


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_depth(root: Path, layout: str, strength: float) -> None:
    depth = torch.from_numpy(np.array(depth_map(), dtype=np.float32))[None]
    want = pixels(depth_pipeline(root)(
        PROMPT, image=picture(), depth_map=depth, strength=strength, num_inference_steps=5, generator=seeded(),
        output_type="pt", **COMMON,
    ))  # fmt: skip
    got = depth_model(root, layout).generate(
        PROMPT, image=picture(), depth=depth_map(), strength=strength, steps=5, seed=3, **COMMON
    )
    assert (got.pixels - want).abs().max() < 1e-3


def test_depth_is_seen(root: Path) -> None:
    """Without a picture too, with a mask, around a mask, in windows, in a second pass, and in a journey."""
    model = depth_model(root, "folder")
    turned = depth_map().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    hole = Image.new("L", (48, 32))
    hole.paste(255, (8, 8, 40, 28))
    ways: list[dict[str, Any]] = [
        {"width": 48, "height": 32},
        {"image": picture(), "mask": hole},
        {"image": picture(), "mask": hole, "mask_area": "masked", "mask_padding": 4, "width": 32, "height": 32},
        {"width": 48, "height": 32, "tiles": {"size": 32, "overlap": 8}},
        {"width": 48, "height": 32, "hires": {"scale": 1.5}},
        {"width": 48, "height": 32, "travel": {"frames": 2, "prompt": "a leaf"}},
        {"width": 48, "height": 32, "count": 2, "batch_size": 2},
    ]
    for fields in ways:
        one, other = (
            model.generate(PROMPT, depth=depth, steps=2, seed=3, **COMMON, **fields).pixels
            for depth in (depth_map(), turned)
        )
        assert one.shape == other.shape
        assert (one - other).abs().max() > 0.01


# x4 upscaler


@cache
def upscaler(root: Path) -> tuple[Any, Path]:
    """A folder whose small pictures are noised by another schedule than the published one's."""
    noising = diffusers.DDPMScheduler(beta_start=0.01, beta_end=0.2)
    pipe = diffusers.StableDiffusionUpscalePipeline(
        **parts_of(root, "x4-upscaler"), low_res_scheduler=noising, max_noise_level=15
    )
    pipe.save_pretrained(root / "upscaler")
    return quiet(pipe), root / "upscaler"


@pytest.mark.parametrize("level", [0, 11])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_x4_upscaler(root: Path, layout: str, level: int) -> None:
    pipe, path = upscaler(root)
    if layout == "file":  # which says nothing of a schedule: the published one is meant
        path = tiny.model_file(root, "x4-upscaler")
        published = diffusers.DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")
        pipe = quiet(type(pipe)(**pipe.components | {"low_res_scheduler": published, "watermarker": None}))
    small = picture(1, (20, 12))  # multiples of 4, which diffusers makes others
    want = pixels(pipe(PROMPT, image=small, noise_level=level, num_inference_steps=3, generator=seeded(),
                       output_type="pt", **COMMON))  # fmt: skip
    got = model(path).generate(PROMPT, image=small, noise_level=level, steps=3, seed=3, **COMMON)
    assert got.pixels.shape == (1, 48, 80, 3)
    assert (got.pixels - want).abs().max() < 1e-3


def test_x4_upscaler_with_other_fields(root: Path) -> None:
    """The defaults, sizes, several pictures, windows, journeys."""
    _, path = upscaler(root)
    small, common = picture(1, (16, 8)), {"steps": 2, "seed": 3, **COMMON}
    plain = model(path).generate(PROMPT, image=small, **common)
    assert plain.request.noise_level == 15  # as many as it knows; the published one knows 350 and takes 20
    assert plain.pixels.shape == (1, 32, 64, 3)
    two = model(path).generate(PROMPT, image=small, count=2, batch_size=2, **common)
    assert (two.pixels[0] - plain.pixels[0]).abs().max() < 1e-4
    assert model(path).generate(PROMPT, image=small, width=48, height=24, **common).pixels.shape == (1, 24, 48, 3)
    windows = model(path).generate(PROMPT, image=small, tiles={"size": 32, "overlap": 16}, **common)
    assert windows.pixels.shape == plain.pixels.shape
    assert not torch.equal(windows.pixels, plain.pixels)
    journey = model(path).generate(PROMPT, image=small, travel={"frames": 2, "prompt": "a leaf"}, **common)
    assert len(journey.pixels) == 2


# unCLIP


@cache
def unclip(root: Path) -> tuple[Any, Path]:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 16}
    config = transformers.CLIPVisionConfig(**shape, image_size=28, patch_size=7, projection_dim=WIDTH)
    normalizer = diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer(WIDTH)
    normalizer.mean.data, normalizer.std.data = torch.randn(1, WIDTH), 0.5 + torch.rand(1, WIDTH)
    pipe = diffusers.StableUnCLIPImg2ImgPipeline(
        **parts_of(root, "unclip"),
        image_encoder=transformers.CLIPVisionModelWithProjection(config).eval(),
        feature_extractor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        image_normalizer=normalizer.eval(),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )
    pipe.save_pretrained(root / "unclip-whole")
    return quiet(pipe), root / "unclip-whole"


def unclip_file(root: Path) -> Path:
    """As Stability's sd21-unclip files have it: OpenCLIP's image encoder, the statistics as buffers."""
    pipe, _ = unclip(root)
    path = root / "unclip-whole.safetensors"
    vision = tiny.open_clip_vision(pipe.image_encoder.state_dict(), "embedder.model.visual.")
    tensors = load_file(tiny.model_file(root, "unclip")) | vision
    tensors |= {
        f"noise_augmentor.data_{name}": getattr(pipe.image_normalizer, name).detach() for name in ("mean", "std")
    }
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("level", [0, 400])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unclip(root: Path, layout: str, level: int) -> None:
    pipe, path = unclip(root)
    path = path if layout == "folder" else unclip_file(root)
    shows = picture(2, (50, 40))
    want = pixels(pipe(shows, PROMPT, noise_level=level, num_inference_steps=3, height=32, width=48,
                       generator=seeded(), output_type="pt", **COMMON))  # fmt: skip
    got = model(path).generate(PROMPT, image=shows, noise_level=level, steps=3, seed=3, width=48, height=32, **COMMON)
    assert (got.pixels - want).abs().max() < 1e-3


def test_what_the_doctor_says_of_unclip(root: Path) -> None:
    report = examine(unclip_file(root))
    assert (report.variant, report.problems) == ("unclip", ())
    assert report.notes == ("1 tensors that no picture needs",)  # alphas_cumprod, which every such file has
    assert {"image_encoder", "image_normalizer", "unet"} <= {part.name for part in report.parts}
    assert "left out" not in dict(report.evidence)


def test_unclip_with_other_fields(root: Path) -> None:
    """Several pictures, a second pass, windows: the picture is told everywhere."""
    _, path = unclip(root)
    common: dict[str, Any] = {"steps": 2, "seed": 3, "width": 32, "height": 32, "noise_level": 30, **COMMON}
    plain = model(path).generate(PROMPT, image=picture(2), **common)
    two = model(path).generate(PROMPT, image=picture(2), count=2, batch_size=2, **common)
    assert (two.pixels[0] - plain.pixels[0]).abs().max() < 1e-4
    for fields in ({"hires": {"scale": 1.5}}, {"tiles": {"size": 16, "overlap": 4}}):
        one, other = (model(path).generate(PROMPT, image=picture(i), **common, **fields).pixels for i in (2, 4))
        assert (one - other).abs().max() > 1e-3


# What cannot be drawn


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("sd2-depth", {}, "give a picture of that with depth"),
        ("sd2-depth", {"image": picture()}, "it is not estimated from image"),
        ("sd2-depth", {"depth": Image.new("L", (48, 32), 7), "width": 48, "height": 32}, "it shows no depth"),
        ("sd2-depth", {"depth": depth_map(), "image": picture(), "extend": {"right": 8}}, "extend the picture first"),
        ("sd2-depth", {"depth": depth_map(), "image": picture(), "resize": "crop"}, "against its depth"),
        ("sd2-depth", {"depth": depth_map(), "noise_level": 3}, "it is shown no picture under noise"),
        ("x4-upscaler", {}, "which is shown a picture; give one with image"),
        ("x4-upscaler", {"image": picture(), "strength": 0.5}, "leave strength out"),
        ("x4-upscaler", {"image": picture(), "mask": picture()}, "leave mask out"),
        ("x4-upscaler", {"image": picture(), "hires": {"scale": 2.0}}, "leave hires out"),
        ("x4-upscaler", {"image": picture(), "noise_level": 500}, "it knows levels up to 19"),
        ("x4-upscaler", {"image": picture(), "depth": depth_map()}, "this model is shown no depth"),
        ("unclip", {"image": picture()}, "the image encoder that it draws after is not in the file"),
    ],
)
def test_refused(root: Path, kind: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as error:
        model(tiny.model(root, kind)).generate(PROMPT, steps=1, **fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "tensor"), [("mean", torch.zeros(1, 5)), ("std", torch.zeros(7))], ids=["mean", "std"]
)
def test_statistics_of_another_width_are_refused(root: Path, tmp_path: Path, name: str, tensor: Tensor) -> None:
    path = tmp_path / "a.safetensors"
    save_file(load_file(unclip_file(root)) | {f"noise_augmentor.data_{name}": tensor}, path)
    with pytest.raises(reverie.ReverieError, match=f"{name} holds {tensor.numel()} numbers; expected {WIDTH}"):
        reverie.load(path, device="cpu")


def test_an_image_encoder_of_another_width_is_refused(root: Path, tmp_path: Path) -> None:
    _, whole = unclip(root)
    tiny.linked(whole, tmp_path / "a")
    config = tmp_path / "a" / "unet" / "config.json"
    said = json.loads(config.read_text())
    weights = tmp_path / "a" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["class_embedding.linear_1.weight"] = tensors["class_embedding.linear_1.weight"][:, :20].contiguous()
    for file, text in ((config, json.dumps(said | {"projection_class_embeddings_input_dim": 20})), (weights, None)):
        file.unlink()
        file.write_text(text) if text else save_file(tensors, file)
    with pytest.raises(reverie.ReverieError, match="is 24 wide but the denoising network expects 20"):
        reverie.load(tmp_path / "a", device="cpu")
