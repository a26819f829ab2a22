"""A second model that takes over: with every sampler and with what else a request may ask for."""

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import reverie
from reverie.errors import RequestError
from reverie.sampling.registry import load_all
from tests import tiny

DDIM = tiny.SCHEDULER | {"_class_name": "DDIMScheduler", "clip_sample": False}
# Nothing but the sample goes from one of their steps to the next, so that it may be handed over.
MEMORYLESS = {
    "ddim", "ddim_cfg_pp", "ddpm", "dpm_2", "dpm_2_a", "dpmpp_2s_a", "dpmpp_2s_a_cfg_pp", "dpmpp_sde",
    "euler", "euler_a", "euler_a_cfg_pp", "euler_cfg_pp", "heun", "lcm", "restart", "seeds_2", "seeds_3", "tcd",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of the same latents, and one of others."""
    root = tmp_path_factory.mktemp("refine")
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks = (
            tiny.text_encoder(**tiny.NARROW | {"num_hidden_layers": 1}),
            tiny.unet(block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, cross_attention_dim=32),
            tiny.vae(block_out_channels=(16, 16, 16), norm_num_groups=8),
        )
        pipe = tiny.assembled(root, tiny.scheduler_of(DDIM), networks, merges_kept=500)
        pipe.save_pretrained(root / str(seed))
    pipe.vae.register_to_config(scaling_factor=0.5)
    pipe.save_pretrained(root / "2")
    return [root / str(i) for i in range(3)]


@pytest.fixture(scope="module")
def model(folders: list[Path]) -> reverie.Model:
    return reverie.load(folders[0], device="cpu", precision="float32")


def drawn(model: reverie.Model, **fields: Any) -> torch.Tensor:
    common: dict[str, Any] = {"steps": 4, "seed": 7, "guidance_scale": 4.0, "spacing": "karras"}
    if "image" not in fields:
        common |= {"width": 32, "height": 32}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prompts whose schedules leave no step
        return model.generate("a [red:green:0.5] apple", **common | fields).pixels


@pytest.mark.parametrize("sampler", list(load_all()))
def test_a_model_that_hands_over_to_itself(model: reverie.Model, folders: list[Path], sampler: str) -> None:
    """Noise and steps go on where they were; as in AUTOMATIC1111 the sampler's memory, too."""
    fields: dict[str, Any] = {"sampler": sampler, "guidance_start": 0.3, "guidance_curve": "linear"}
    if sampler not in MEMORYLESS:
        fields["preset"] = "a1111"
    refined = drawn(model, **fields, refine={"model": str(folders[0]), "at": 0.6})
    assert torch.equal(drawn(model, **fields), refined)


HALF = Image.new("L", (32, 32))
HALF.paste(255, (16, 0, 32, 32))
PICTURE = Image.effect_noise((32, 32), 60).convert("RGB")
WAYS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "image": ({"image": PICTURE, "strength": 0.9}, (32, 32)),
    "mask": ({"image": PICTURE, "mask": HALF}, (32, 32)),
    "outpainting": ({"image": PICTURE, "extend": {"right": 8}}, (40, 32)),
    "hires": ({"hires": {"scale": 1.5, "strength": 0.9, "steps": 6}}, (48, 48)),
    "tiles": ({"width": 48, "tiles": {"size": 32, "overlap": 8}}, (48, 32)),
    "seamless": ({"seamless": "both"}, (32, 32)),
    "travel": ({"travel": {"frames": 2, "prompt": "a leaf", "seed": 3}}, (32, 32)),
    "batch": ({"count": 3, "batch_size": 2}, (32, 32)),
    "noise on the way": ({"sampler": "dpmpp_2m_sde"}, (32, 32)),
    "guides": ({"guides": ("pag:scale=2",)}, (32, 32)),
    "variation": ({"variation_seed": 3, "variation_strength": 0.4}, (32, 32)),
    "sigmas": ({"sigmas": (14.0, 6.0, 2.0, 0.8, 0.2)}, (32, 32)),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(model: reverie.Model) -> Callable[[str, str | None], torch.Tensor]:
    """`(way, preset) -> what the first model alone draws`."""
    return cache(lambda way, preset: drawn(model, **WAYS[way][0], preset=preset))


@pytest.mark.parametrize("how", [{"at": 0.5}, {"at": 0.5, "preset": "a1111"}, {"strength": 0.6}],
                         ids=["handed over", "switched", "drawn over"])  # fmt: skip
@pytest.mark.parametrize("way", list(WAYS))
def test_with_other_fields(
    model: reverie.Model,
    folders: list[Path],
    plain: Callable[[str, str | None], torch.Tensor],
    way: str,
    how: dict[str, Any],
) -> None:
    """Drawn, of the right size, and otherwise than the first model alone does; what is not drawn stays."""
    fields, (width, height) = WAYS[way]
    preset = how.get("preset")
    refine = {"model": str(folders[1])} | {name: value for name, value in how.items() if name != "preset"}
    alone, refined = plain(way, preset), drawn(model, **fields, preset=preset, refine=refine)
    assert refined.shape == alone.shape
    assert refined.shape[1:3] == (height, width)
    assert torch.isfinite(refined).all()
    assert (refined - alone).abs().max() > 2e-3
    if way == "mask":
        assert torch.equal(refined[:, :, :16], alone[:, :, :16])


def test_progress_counts_both(model: reverie.Model, folders: list[Path]) -> None:
    seen: list[tuple[int, int]] = []

    def counted(**refine: Any) -> list[tuple[int, int]]:
        seen.clear()
        fields: dict[str, Any] = {"steps": 6, "width": 32, "height": 32, "sampler": "euler"}
        model.generate(**fields, refine={"model": str(folders[1]), **refine}, progress=lambda *at: seen.append(at))
        return seen

    assert counted(at=0.5) == [(i, 6) for i in range(1, 7)]
    assert counted(strength=0.5, steps=8) == [(i, 10) for i in range(1, 11)]


def test_guidance_of_its_own(model: reverie.Model, folders: list[Path]) -> None:
    refine = {"model": str(folders[1]), "at": 0.5}
    assert torch.equal(drawn(model, refine=refine), drawn(model, refine=refine | {"guidance_scale": 4.0}))
    assert not torch.equal(drawn(model, refine=refine), drawn(model, refine=refine | {"guidance_scale": 8.0}))


def test_it_is_opened_once_and_the_last_is_kept(folders: list[Path]) -> None:
    model = reverie.load(folders[0], device="cpu", precision="float32")
    first = model.successor(str(folders[1]))
    assert model.successor(str(folders[1])) is first
    assert (first.device, first.dtype) == (model.device, model.dtype)
    first.ready("unet", first.parts.unet)
    assert model.successor(str(folders[2])) is not first
    assert (id(first), "unet") not in model._residents.placed


def test_one_part_at_a_time_counts_both_models(folders: list[Path]) -> None:
    model = reverie.load(folders[0], device="cpu", precision="float32", offload=True)
    got = drawn(model, refine={"model": str(folders[1]), "at": 0.5})
    assert {name for _, name in model._residents.placed} == {"vae"}
    plain = reverie.load(folders[0], device="cpu", precision="float32")
    assert torch.equal(got, drawn(plain, refine={"model": str(folders[1]), "at": 0.5}))
    assert len(plain._residents.placed) == 5  # two text encoders, two U-Nets, one VAE


@pytest.mark.parametrize(
    ("refine", "said"),
    [
        ({"at": 0.5, "strength": 0.5}, "give at or strength"),
        ({"at": 0.5, "steps": 5}, "refine.steps goes with refine.strength"),
        ({"at": 0.9}, "leaves the refiner none of 4 steps"),
        ({"at": 0.0005}, "leaves the first model none of 3 steps"),
        ({"at": 1.0}, "less than 1"),
        ({"model": "nowhere/at/all"}, "no such path"),
        ({"model": 2}, "other latents than the model"),
    ],
)
def test_refused(model: reverie.Model, folders: list[Path], refine: dict[str, Any], said: str) -> None:
    name = refine.get("model", 1)
    path = str(folders[name]) if isinstance(name, int) else name
    late: dict[str, Any] = {"image": PICTURE, "strength": 0.9} if refine.get("at") == 0.0005 else {}
    with pytest.raises(RequestError, match=said) as error:
        drawn(model, spacing="trailing", **late, refine=refine | {"model": path})
    assert "\n" not in str(error.value)


def test_sizes_are_refused_where_nobody_is_told(model: reverie.Model) -> None:
    with pytest.raises(RequestError, match=r"sizes.crop is not told to this model: SDXL is told sizes"):
        drawn(model, sizes={"crop": "3x5"})
    with pytest.raises(RequestError, match="expected two numbers of pixels"):
        drawn(model, sizes={"crop": "3"})
