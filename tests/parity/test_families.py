"""Every family against diffusers and transformers: networks, text encoders, conditions, whole pictures.

Tolerance 1e-5 of the largest number for networks and conditions, as in test_nets; 1e-3 of [0, 1] for pictures, as in
test_pictures (largest difference seen: 1e-5).
"""

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import reverie
from reverie.families import configs
from reverie.families.base import Parts, Sizes
from reverie.families.detect import load_parts
from reverie.families.pieces import tidied_clip
from reverie.nets.clip_text import ClipText
from reverie.nets.unet import UNet
from reverie.text.embed import Tokens
from reverie.types import Cond
from tests import tiny
from tests.families import published
from tests.parity.test_nets import RELATIVE, difference, loaded, rand, shaken

PROMPT, NEGATIVE = "a red apple on a table, 猫", "blurry"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def folder_of(root: Path, kind: str) -> Path:
    return tiny.sd3_model(root, kind) if kind in tiny.SD3_KINDS else tiny.model(root, kind)


def file_of(root: Path, kind: str) -> Path:
    return tiny.sd3_file(root, kind) if kind in tiny.SD3_KINDS else tiny.model_file(root, kind)


# U-Nets

# What no test of test_nets has: vectors, depths, middles, a guidance scale.
NEW = ("lcm", "bk-sdm-small", "tiny-sd", "unclip", "x4-upscaler", "sdxl", "refiner", "ssd-1b", "koala")
UNETS: dict[str, Any] = {kind: tiny.RECIPES[kind].unet for kind in NEW} | {
    "three layers of different depths": tiny.XL3 | {
        "layers_per_block": 3, "transformer_layers_per_block": [1, [1, 2, 1], 2],
        "reverse_transformer_layers_per_block": [[1, 1, 2, 3], 2, 1],
    },
    "the middle alone": {"mid_block_type": "UNetMidBlock2D", "cross_attention_dim": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(UNETS))
@torch.no_grad()
def test_unet(kind: str) -> None:
    """At a size that does not halve evenly."""
    torch.manual_seed(0)
    reference = shaken(tiny.unet(**UNETS[kind]))
    config = configs.unet_config({k: list(v) if isinstance(v, tuple) else v for k, v in reference.config.items()})
    with torch.device("meta"):
        ours = UNet(config)
    ours = loaded(ours, reference)
    x, context = rand(2, config.in_channels, 9, 13), rand(2, 7, config.context_width, seed=1)
    timesteps = torch.tensor([3.0, 870.25])
    given, vector, guidance = extra(reference)
    want = reference(x, timesteps, encoder_hidden_states=context, **given).sample
    assert difference(ours(x, timesteps, context, vector=vector, guidance=guidance), want) < RELATIVE


def extra(reference: Any) -> tuple[dict[str, Any], Tensor | None, Tensor | None]:
    """What such a network is told beside the prompt: as diffusers takes it, our vector, our guidance scales."""
    c = reference.config
    if c.addition_embed_type == "text_time":
        width = c.addition_time_embed_dim
        count = (c.projection_class_embeddings_input_dim - 24) // width
        ids, pooled = 100 * rand(2, count, seed=3).abs(), rand(2, 24, seed=2)
        told = reference.add_time_proj(ids.flatten()).reshape(2, -1)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}, torch.cat([pooled, told], dim=-1), None
    if c.class_embed_type == "projection":
        vector = rand(2, c.projection_class_embeddings_input_dim, seed=2)
        return {"class_labels": vector}, vector, None
    if c.num_class_embeds:
        levels = torch.tensor([3, 17])
        return {"class_labels": levels}, levels[:, None].float(), None
    if c.time_cond_proj_dim:
        scales = torch.tensor([1.0, 8.5])
        pipeline = tiny.diffusers.LatentConsistencyModelPipeline
        told = pipeline.get_guidance_scale_embedding(None, scales - 1, embedding_dim=c.time_cond_proj_dim)
        return {"timestep_cond": told}, None, scales
    return {}, None, None


# Text encoders


@cache
def texts(**settings: Any) -> tuple[Any, ClipText]:
    """CLIP's with projection, in which the end of text is said to have the id 2, as published configs do."""
    torch.manual_seed(0)
    small = {"vocab_size": 99, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = tiny.text_encoder(**(tiny.LEGACY | small | settings)).config
    reference = shaken(tiny.transformers.CLIPTextModelWithProjection(config).eval())
    ours = ClipText(configs.text_config(config.to_dict(), projected=True))
    ours.load_state_dict(tidied_clip(reference.state_dict()), strict=True)
    return reference, ours.eval()


@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("settings", [{}, {"hidden_act": "gelu", "projection_dim": 24}], ids=["quick_gelu", "gelu"])
@torch.no_grad()
def test_layers_and_pooled_output(settings: dict[str, Any], skip: int) -> None:
    """Of rows that end early, late, and in the last place; the padding may be the end of text again."""
    reference, ours = texts(**settings)
    ids = torch.randint(1, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    ids[0, 4:], ids[1, 9], ids[1, 10:], ids[2, 11] = 98, 98, 0, 98
    want = reference(ids, output_hidden_states=True)
    hidden, pooled = ours.encode(ids, skip, eos=98, final_norm=False)
    assert difference(hidden, want.hidden_states[-1 - skip]) < RELATIVE
    assert difference(pooled, want.text_embeds) < RELATIVE
    norm = reference.text_model.final_layer_norm
    assert difference(ours(ids, skip), norm(want.hidden_states[-1 - skip])) < RELATIVE
    assert torch.equal(ours(ids, skip, final_norm=False), hidden)


@torch.no_grad()
def test_the_text_encoder_of_sd2_is_that_of_open_clip_without_its_last_layer(root: Path, tmp_path: Path) -> None:
    """Stability's rule for 24 layers: what the layer before the last says, through the final norm."""
    torch.manual_seed(0)
    whole = shaken(tiny.text_encoder(**tiny.H | {"num_hidden_layers": 24}))
    rest = {n: t for n, t in load_file(file_of(root, "sd2")).items() if not n.startswith("cond_stage_model.")}
    text = {f"cond_stage_model.model.{n}": t for n, t in tiny.open_clip_tensors(whole.state_dict()).items()}
    save_file(rest | text, tmp_path / "a.safetensors")
    (tower,) = load_parts(tmp_path / "a.safetensors").towers
    ids = torch.tensor([tower.tokenizer(PROMPT).ids])
    hidden = whole(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 25
    norm = getattr(whole, "text_model", whole).final_layer_norm
    assert difference(tower.encode(tower.module, Tokens(ids), 0).hidden, norm(hidden[-2])) < RELATIVE
    assert difference(tower.encode(tower.module, Tokens(ids), 1).hidden, norm(hidden[-3])) < RELATIVE


# Conditions


@cache
def pipeline(root: Path, kind: str) -> Any:
    """The pipeline of diffusers."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    absent: dict[str, Any] = {}
    if kind == "sd3-without-t5":
        absent = {"text_encoder_3": None, "tokenizer_3": None}
    elif kind in {"sd1", "bk-sdm-small", "sd2", "sd2-v", "lcm"}:
        absent = {"safety_checker": None, "requires_safety_checker": False}
    pipe = tiny.diffusers.DiffusionPipeline.from_pretrained(folder_of(root, kind), **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def opened(path: Path) -> Parts:
    """Opened once; nobody changes it."""
    return load_parts(path)


@torch.no_grad()
def told(parts: Parts, prompt: str, sizes: Sizes, skip: int = 0) -> Cond:
    """The condition of a prompt that fits into one chunk."""
    tokens = [Tokens(torch.tensor([tower.tokenizer(prompt).ids])) for tower in parts.towers]
    said = [tower.encode(tower.module, own, skip) for tower, own in zip(parts.towers, tokens, strict=True)]
    return parts.condition(said, sizes)


SIZES = Sizes(
    64, 48, original=(100, 90), crop=(3, 5), target=(80, 72), aesthetic_score=6.5, negative_original=(30, 20),
    negative_target=(50, 40), negative_aesthetic_score=1.5,
)  # fmt: skip


@pytest.mark.parametrize("clip_skip", [None, 1])
@pytest.mark.parametrize("kind", ["sdxl", "refiner"])
@torch.no_grad()
def test_condition_of_sdxl(root: Path, kind: str, clip_skip: int | None) -> None:
    """`encode_prompt` and `_get_add_time_ids`, through the network's own sines: what it adds to the time embedding."""
    pipe, parts = pipeline(root, kind), opened(file_of(root, kind))
    positive, negative, pooled, negative_pooled = pipe.encode_prompt(
        PROMPT, negative_prompt=NEGATIVE, do_classifier_free_guidance=True, clip_skip=clip_skip
    )
    ids, negative_ids = time_ids(pipe, SIZES)
    for prompt, sizes, context, text, numbers in (
        (PROMPT, SIZES, positive, pooled, ids),
        (NEGATIVE, SIZES.negative(), negative, negative_pooled, negative_ids),
    ):
        # diffusers leaves no layers out of the negative prompt
        cond = told(parts, prompt, sizes, skip=clip_skip or 0 if prompt == PROMPT else 0)
        want = torch.cat([text, pipe.unet.add_time_proj(numbers.flatten()).reshape(1, -1)], dim=-1)
        assert difference(cond.context, context) < RELATIVE
        assert cond.vector is not None
        assert difference(cond.vector, want) < RELATIVE


def time_ids(pipe: Any, s: Sizes) -> tuple[Tensor, Tensor]:
    """As diffusers arranges them, rows before columns; it crops the negative prompt's like the prompt's."""
    assert s.original and s.target and s.negative_original and s.negative_target
    width = pipe.text_encoder_2.config.projection_dim
    original, target, crop = s.original[::-1], s.target[::-1], s.crop[::-1]
    others = s.negative_original[::-1], s.negative_target[::-1]
    if pipe.config.get("requires_aesthetics_score"):
        found: tuple[Tensor, Tensor] = pipe._get_add_time_ids(
            original, crop, target, s.aesthetic_score, s.negative_aesthetic_score, others[0], crop, others[1],
            torch.float32, width,
        )  # fmt: skip
        return found
    negative = pipe._get_add_time_ids(others[0], crop, others[1], torch.float32, width)
    return pipe._get_add_time_ids(original, crop, target, torch.float32, width), negative


@pytest.mark.parametrize("clip_skip", [None, 1])
@pytest.mark.parametrize("kind", ["sd3", "sd3-without-t5"])
@torch.no_grad()
def test_condition_of_sd3(root: Path, kind: str, clip_skip: int | None) -> None:
    pipe, parts = pipeline(root, kind), opened(file_of(root, kind))
    context, _, pooled, _ = pipe.encode_prompt(PROMPT, PROMPT, PROMPT, negative_prompt=NEGATIVE, clip_skip=clip_skip)
    cond = told(parts, PROMPT, SIZES, skip=clip_skip or 0)
    assert cond.context.shape == (1, 77 + 256, 112)
    assert difference(cond.context, context) < RELATIVE
    assert cond.vector is not None
    assert difference(cond.vector, pooled) < RELATIVE


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@torch.no_grad()
def test_condition_of_sd1_and_sd2(root: Path, kind: str) -> None:
    pipe, parts = pipeline(root, kind), opened(file_of(root, kind))
    contexts = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    for prompt, context in zip((PROMPT, NEGATIVE), contexts, strict=True):
        cond = told(parts, prompt, SIZES)
        assert difference(cond.context, context) < RELATIVE
        assert cond.vector is None


# Pictures

PICTURES = [
    "sd1",
    "bk-sdm-small",
    "sd2",
    "sd2-v",
    "sdxl",
    "ssd-1b",
    "koala",
    "playground",
    "sd3",
    "sd3-without-t5",
    "sd35-medium",
]


@pytest.mark.parametrize("kind", PICTURES)
def test_picture(root: Path, kind: str) -> None:
    """From the single file; from the folder where it alone says what is predicted, and for one of each shape."""
    pipe = pipeline(root, kind)
    result = pipe(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=4, guidance_scale=5.0, height=32, width=48,
        generator=torch.Generator().manual_seed(3), output_type="pt",
    )  # fmt: skip
    want = result.images.permute(0, 2, 3, 1).float()
    folders = [folder_of(root, kind)] if kind in {"sd2-v", "sdxl", "sd3"} else []
    for path in folders + ([] if kind == "sd2-v" else [file_of(root, kind)]):
        model = reverie.load(path, device="cpu", precision="float32")
        got = model.generate(
            PROMPT, negative_prompt=NEGATIVE, steps=4, guidance_scale=5.0, seed=3, width=48, height=32
        ).pixels
        assert (got - want).abs().max() < 1e-3


def test_picture_of_sd2_v_with_zero_terminal_snr(root: Path) -> None:
    """With rescaled guidance, from the folder and from a file that says so by its tensors (Lin et al. 2023)."""
    scheduler = tiny.V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    folder = root / "sd2-v-zero"
    tiny.linked(folder_of(root, "sd2-v"), folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file(load_file(file_of(root, "sd2-v")) | marks, root / "sd2-v-zero.safetensors")
    pipe = type(pipeline(root, "sd2-v"))(
        **pipeline(root, "sd2-v").components | {"scheduler": tiny.scheduler_of(scheduler)},
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    result = pipe(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=4, guidance_scale=5.0, guidance_rescale=0.7, height=32,
        width=48, generator=torch.Generator().manual_seed(3), output_type="pt",
    )  # fmt: skip
    for path in (folder, root / "sd2-v-zero.safetensors"):
        model = reverie.load(path, device="cpu", precision="float32")
        got = model.generate(
            PROMPT, negative_prompt=NEGATIVE, steps=4, guidance_scale=5.0, guidance_rescale=0.7, seed=3, width=48,
            height=32,
        )  # fmt: skip
        assert (got.pixels - result.images.permute(0, 2, 3, 1)).abs().max() < 1e-3


def test_picture_without_a_negative_prompt(root: Path) -> None:
    """SDXL is shown zeros in its place."""
    result = pipeline(root, "sdxl")(
        PROMPT, num_inference_steps=4, guidance_scale=5.0, height=32, width=32,
        generator=torch.Generator().manual_seed(3), output_type="pt",
    )  # fmt: skip
    model = reverie.load(file_of(root, "sdxl"), device="cpu", precision="float32")
    got = model.generate(PROMPT, steps=4, guidance_scale=5.0, seed=3, width=32, height=32).pixels
    assert (got - result.images.permute(0, 2, 3, 1)).abs().max() < 1e-3


def picture(*, seed: int) -> Image.Image:
    return Image.fromarray((torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(seed)) * 255).byte().numpy())


def test_picture_of_the_refiner(root: Path) -> None:
    """It refines: from a picture, half of the way."""
    image = picture(seed=0)
    result = pipeline(root, "refiner")(
        PROMPT, image=image, negative_prompt=NEGATIVE, num_inference_steps=6, strength=0.5, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3), output_type="pt",
    )  # fmt: skip
    got = reverie.load(file_of(root, "refiner"), device="cpu", precision="float32").generate(
        PROMPT, image=image, negative_prompt=NEGATIVE, steps=6, strength=0.5, guidance_scale=5.0, seed=3
    )
    assert (got.pixels - result.images.permute(0, 2, 3, 1)).abs().max() < 1e-3


def test_picture_of_sdxl_for_inpainting(root: Path) -> None:
    image, mask = picture(seed=0), Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    result = pipeline(root, "sdxl-inpaint")(
        PROMPT, image=image, mask_image=mask, negative_prompt=NEGATIVE, num_inference_steps=4, strength=1.0,
        guidance_scale=5.0, height=32, width=32, generator=torch.Generator().manual_seed(3), output_type="pt",
    )  # fmt: skip
    got = reverie.load(file_of(root, "sdxl-inpaint"), device="cpu", precision="float32").generate(
        PROMPT, image=image, mask=mask, negative_prompt=NEGATIVE, steps=4, strength=1.0, guidance_scale=5.0, seed=3,
        keep_unmasked=False,
    )  # fmt: skip
    assert (got.pixels - result.images.permute(0, 2, 3, 1)).abs().max() < 1e-3


def test_picture_of_a_network_that_is_told_the_guidance_scale(root: Path) -> None:
    pipe = pipeline(root, "lcm")
    result = pipe(
        PROMPT, num_inference_steps=4, guidance_scale=8.0, height=32, width=32,
        generator=torch.Generator().manual_seed(3), output_type="pt",
    )  # fmt: skip
    model = reverie.load(folder_of(root, "lcm"), device="cpu", precision="float32")
    got = model.generate(PROMPT, steps=4, guidance_scale=8.0, seed=3, width=32, height=32).pixels
    assert (got - result.images.permute(0, 2, 3, 1)).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("model", ["stable-diffusion-xl-base-1.0", "SSD-1B", "koala-700m"])
@torch.no_grad()
def test_unet_at_true_width(model: str) -> None:
    """Every level and place of the published network, with transformers of depth 1: about 6 GB at the most."""
    json = published.UNETS[model]
    shallow = {k: v for k, v in json.items() if "transformer_layers" not in k}
    torch.manual_seed(0)
    reference = tiny.diffusers.UNet2DConditionModel(**shallow).eval()
    with torch.device("meta"):
        ours = UNet(configs.unet_config(shallow))
    ours = loaded(ours, reference)
    x, context, timesteps = rand(1, 4, 32, 32), rand(1, 77, 2048, seed=1), torch.tensor([981.0])
    pooled, ids = rand(1, 1280, seed=2), torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]])
    vector = torch.cat([pooled, reference.add_time_proj(ids.flatten()).reshape(1, -1)], dim=-1)
    given = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
    want = reference(x, timesteps, encoder_hidden_states=context, **given).sample
    assert difference(ours(x, timesteps, context, vector=vector), want) < RELATIVE
