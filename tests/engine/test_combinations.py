"""Every pair of task, guidance, sampler family and prompt feature, on the bundled model, keeps every contract.

For each: nothing fails, the size is right, unmasked pixels are those of the picture, and a picture of a batch is the
picture alone (which also says that the same seed draws the same picture).
"""

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import reverie
from reverie.engine.bundle import Model
from reverie.sampling.guides import load_all as load_guides
from reverie.sampling.registry import load_all as load_samplers

SIZE = 32

TASKS = (
    "text",
    "image",
    "inpaint",
    "inpaint only masked",
    "outpaint",
    "hires",
    "tiles",
    "seamless",
    "variation",
    "travel",
)
GUIDES = ("none", *sorted(load_guides()))
FAMILIES: dict[str, tuple[str, ...]] = {
    "first order": ("euler", "ddim", "gradient_estimation"),
    "two evaluations": ("heun", "heunpp2", "dpm_2", "restart"),
    "multistep": ("dpmpp_2m", "lms", "pndm", "unipc", "deis", "ipndm", "res_multistep", "dpmpp_3m"),
    "ancestral": ("euler_a", "dpm_2_a", "dpmpp_2s_a", "ddpm"),
    "distilled": ("lcm", "tcd"),
    "sde": ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "er_sde", "sa_solver"),
    "own steps": ("dpm_fast", "dpm_adaptive"),
    "cfg++": ("euler_cfg_pp", "euler_a_cfg_pp", "dpmpp_2m_cfg_pp"),
}
PROMPTS = {
    "plain": "a red apple",
    "weights": "a (red:1.3) [apple] ((leaf))",
    "schedule": "a [red:green:0.5] apple",
    "alternation": "a [red|green] apple",
    "and": "a red apple AND a leaf :0.4",
    "wildcard": "a {red|green|yellow} apple",
    "break": "a red apple BREAK with a leaf",
    "long": "a red apple, a green leaf, a yellow sun, a blue star, a white cloud, an orange cat, a pink heart",
}
FACTORS = (TASKS, GUIDES, tuple(FAMILIES), tuple(PROMPTS))


def covering() -> Iterator[tuple[str, ...]]:
    """Rows that have every pair of values of two factors at least once (greedy)."""
    places = list(itertools.combinations(range(len(FACTORS)), 2))
    missing = {(i, a, j, b) for i, j in places for a in FACTORS[i] for b in FACTORS[j]}
    while missing:
        best = _row(missing)
        missing -= {(i, best[i], j, best[j]) for i, j in places}
        yield best


def _row(missing: set[tuple[int, str, int, str]]) -> tuple[str, ...]:
    i, a, j, b = min(missing)
    row: dict[int, str] = {i: a, j: b}
    for k in range(len(FACTORS)):
        if k not in row:
            row[k] = max(FACTORS[k], key=lambda v: sum(_pair(k, v, o, w) in missing for o, w in row.items()))
    return tuple(row[k] for k in range(len(FACTORS)))


def _pair(i: int, a: str, j: int, b: str) -> tuple[int, str, int, str]:
    return (i, a, j, b) if i < j else (j, b, i, a)


ROWS = list(covering())


def test_every_pair_is_there() -> None:
    for (i, one), (j, other) in itertools.combinations(enumerate(FACTORS), 2):
        assert {(row[i], row[j]) for row in ROWS} == set(itertools.product(one, other))


def test_every_sampler_is_in_a_family_or_has_its_own_test() -> None:
    listed = {name for names in FAMILIES.values() for name in names}
    assert listed <= set(load_samplers())


@pytest.fixture(scope="module")
def model() -> Model:
    return reverie.load(device="cpu", precision="float32")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A picture and a mask of its right half."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(root / "image.png")
    mask = Image.new("L", (SIZE, SIZE), 0)
    mask.paste(255, (SIZE // 2, 0, SIZE, SIZE))
    mask.save(root / "mask.png")
    return {"image": str(root / "image.png"), "mask": str(root / "mask.png")}


def fields_of(task: str, pictures: dict[str, str]) -> tuple[dict[str, Any], tuple[int, int]]:
    """Fields of a task, and the width and height of what it draws."""
    picture = {"image": pictures["image"]}
    both = {**picture, "mask": pictures["mask"]}
    found: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
        "text": ({}, (SIZE, SIZE)),
        "image": ({**picture, "strength": 0.7}, (SIZE, SIZE)),
        "inpaint": ({**both, "mask_blur": 2.0}, (SIZE, SIZE)),
        "inpaint only masked": (
            {**both, "mask_area": "masked", "mask_padding": 4, "width": 16, "height": 32, "strength": 0.8},
            (SIZE, SIZE),
        ),
        "outpaint": ({**picture, "extend": {"right": 8}}, (SIZE + 8, SIZE)),
        "hires": ({"hires": {"scale": 1.5, "strength": 0.6}}, (48, 48)),
        "tiles": ({"width": 48, "tiles": {"size": 32, "overlap": 8}}, (48, SIZE)),
        "seamless": ({"seamless": "both"}, (SIZE, SIZE)),
        "variation": ({"variation_seed": 9, "variation_strength": 0.3}, (SIZE, SIZE)),
        "travel": ({"travel": {"frames": 2, "prompt": "a green leaf", "seed": 4}}, (SIZE, SIZE)),
    }
    return found[task]


@pytest.mark.parametrize("row", ROWS, ids=" | ".join)
def test_pair(model: Model, pictures: dict[str, str], row: tuple[str, ...]) -> None:
    task, guide, family, prompt = row
    sampler = FAMILIES[family][ROWS.index(row) % len(FAMILIES[family])]
    fields, size = fields_of(task, pictures)
    fields = {"width": SIZE, "height": SIZE, **fields} if "image" not in fields else fields
    fields |= {
        "prompt": PROMPTS[prompt], "negative_prompt": "blurry", "seed": 5, "steps": 2, "upscaler": "none",
        "sampler": sampler, "spacing": "karras",
        # from this model's 4096 down the sampler that chooses its own steps takes hundreds
        "spacing_options": {"sigma_max": 15.0} if sampler == "dpm_adaptive" else {},
        "sampler_options": {"rtol": 0.5, "atol": 0.5} if sampler == "dpm_adaptive" else {},
        "guides": () if guide in {"none", "instruct_pix2pix"} else (guide,),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights and schedules that these few steps leave no room for
        result = _drawn(model, fields, {} if task == "travel" else {"count": 2, "batch_size": 2})
        alone = _drawn(model, fields, {})
    assert result.pixels.shape[1:] == (size[1], size[0], 3)
    assert bool(torch.isfinite(result.pixels).all())
    assert (result.pixels[: len(alone.pixels)] - alone.pixels).abs().max() < 5e-3  # other batch, other kernels
    if task in {"inpaint", "inpaint only masked"}:
        kept = (result.pixels[0] * 255).round().byte().numpy()[:, : SIZE // 2]
        assert np.array_equal(kept, np.asarray(Image.open(pictures["image"]))[:, : SIZE // 2])


def _drawn(model: Model, fields: dict[str, Any], more: dict[str, Any]) -> reverie.Result:
    return model.generate(**fields, **more)


def test_guidance_by_picture_needs_a_model_for_it(model: Model) -> None:
    with pytest.raises(reverie.ReverieError, match="a model that is shown a picture"):
        model.generate("a red apple", guides=("instruct_pix2pix",), steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sampler", sorted(load_samplers()))
def test_every_sampler_with_every_task(
    model: Model, pictures: dict[str, str], tmp_path: Path, sampler: str, task: str
) -> None:
    fields, size = fields_of(task, pictures)
    fields = {"width": SIZE, "height": SIZE, **fields} if "image" not in fields else fields
    result = model.generate("a red apple", seed=3, steps=4, upscaler="none", sampler=sampler, **fields)
    assert result.pixels.shape[1:] == (size[1], size[0], 3)
    assert bool(torch.isfinite(result.pixels).all())
