"""The `parameters` text of a request."""

import pytest
from hypothesis import given, settings

import reverie
from reverie.diffusion.spacing import SPACINGS
from reverie.engine.metadata import a1111, a1111_read, infotext
from reverie.engine.request import Hires, Request
from reverie.sampling.registry import load_all
from tests.engine.metadata import samples

MODEL = {"name": "dreamshaper_8", "hash": "abc123def0" * 6 + "abcd"}
VERSION = f"Reverie {reverie.__version__}"
PLAIN = Request(
    prompt="a cat", seed=7, steps=20, sampler="dpmpp_2m", spacing="karras", guidance_scale=7.0, width=512, height=768,
    rng="cpu",
)  # fmt: skip


def settings_of(**changes: object) -> list[tuple[str, str]]:
    """Keys and values of the last line, in order."""
    request = Request.of(**(PLAIN.model_dump(exclude_unset=True) | changes))
    return list(infotext.entries(a1111.write(request, MODEL).split("\n")[-1]))


def test_the_whole_text() -> None:
    assert a1111.write(PLAIN.model_copy(update={"negative_prompt": "rain\nfog"}), MODEL) == (
        "a cat\nNegative prompt: rain\nfog\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, "
        f"Seed: 7, Size: 512x768, Model hash: abc123def0, Model: dreamshaper_8, RNG: CPU, Version: {VERSION}"
    )


ORDER = """Steps|Sampler|Schedule type|CFG scale|Image CFG scale|Seed|Size|Model hash|Model|Variation seed|
Variation seed strength|Seed resize from|Denoising strength|Clip skip|ENSD|Init image hash|RNG|Tiling|Hires prompt|
Hires negative prompt|Hires upscale|Hires upscaler|Hires steps|Hires resize|Hires sampler|Hires schedule type|
Hires CFG Scale|Mask blur|Inpaint area|Masked area padding|Masked content|Mask mode|Eta|Sigma churn|Sigma tmin|
Sigma tmax|Sigma noise|Discard penultimate sigma|Schedule rho|Schedule min sigma|Schedule max sigma|Emphasis|
Version""".replace("\n", "").split("|")


def test_the_order_of_the_keys() -> None:
    hires = Hires(
        prompt="a", negative_prompt="b", scale=3, width=1024, steps=5, sampler="euler", spacing="simple",
        guidance_scale=3,
    )  # fmt: skip
    request = Request.of(**PLAIN.model_dump(exclude_unset=True) | {
        "image_guidance_scale": 1.5, "variation_seed": 3, "variation_strength": 0.1, "seed_width": 64,
        "seed_height": 64, "clip_skip": 2, "eta_noise_delta": 31337, "seamless": "both", "hires": hires,
        "mask": "m.png", "mask_blur": 4, "mask_area": "masked", "mask_padding": 16, "mask_fill": "noise",
        "mask_invert": True, "eta": 0.5,
        "sampler_options": {"s_churn": 1, "s_tmin": 0.1, "s_tmax": 9, "s_noise": 1.1}, "discard_penultimate": True,
        "spacing_options": {"rho": 5, "sigma_min": 0.1, "sigma_max": 9}, "emphasis": "no_norm", "image": "i.png",
    })  # fmt: skip
    text = a1111.write(request, MODEL, {"image": "0123456789abcdef", "mask": "ff"})
    assert [key for key, _ in infotext.entries(text.split("\n")[-1])] == ORDER


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({"image": "a.png", "strength": 0.75}, [("Denoising strength", "0.75")]),
        ({"hires": {"strength": 0.4}},
         [("Denoising strength", "0.4"), ("Hires upscale", "2"), ("Hires upscaler", "Latent")]),
        ({"hires": {"width": 1024, "height": 512, "upscaler": "latent_nearest_exact"}},
         [("Denoising strength", "0.7"), ("Hires upscaler", "Latent (nearest-exact)"), ("Hires resize", "1024x512")]),
        ({"mask": "m.png"}, [("Mask blur", "0")]),
        ({"mask": "m.png", "mask_fill": "zero"}, [("Mask blur", "0"), ("Masked content", "latent nothing")]),
        ({"sampler": "ddim", "eta": 1}, [("Eta DDIM", "1")]),
        ({"clip_skip": 1}, []),
        ({"upscaler": "none"}, [("Postprocess upscaler", "none")]),
        ({"guidance_rescale": 0.7, "seamless": "x"}, [("Seamless", "x"), ("Guidance rescale", "0.7")]),
        ({"dialect": "comfy", "preset": "comfy"}, [("Dialect", "comfy"), ("Preset", "comfy")]),
        ({"guides": ["pag:scale=3"]}, [("Guides", '[{"name": "pag", "options": {"scale": 3}}]')]),
        ({"tiles": {"size": 768}}, [("Tiles", '{"size": 768}')]),
        ({"count": 3, "only": 1}, [("Count", "3"), ("Only", "1")]),
        ({"wildcards": "cards", "vae_tile": 64, "batch_size": 8}, []),
    ],
)  # fmt: skip
def test_further_settings(changes: dict[str, object], written: list[tuple[str, str]]) -> None:
    common = dict(settings_of()).keys()
    assert [(key, value) for key, value in settings_of(**changes) if key not in common] == written


@pytest.mark.parametrize(("rng", "written"), [("cpu", "CPU"), ("philox", "NV"), ("device", None), (None, "CPU")])
def test_where_random_numbers_come_from(rng: str | None, written: str | None) -> None:
    assert dict(settings_of(rng=rng)).get("RNG") == written


def test_pictures_in_the_request_are_named_by_their_hash() -> None:
    request = PLAIN.model_copy(update={"image": "data:image/png;base64,AAAA", "mask": "data:image/png;base64,BBBB"})
    text = a1111.write(request, MODEL, {"image": "0123456789abcdef"})
    assert "Init image hash: 0123456789, " in text
    assert "base64" not in text


def test_a_spacing_without_a_label_of_its_own_is_named_too() -> None:
    written = dict(settings_of(spacing="linspace", hires={"spacing": "trailing"}))
    assert (written["Schedule type"], written["Spacing"]) == ("Uniform", "linspace")
    assert (written["Hires schedule type"], written["Hires"]) == ("Simple", '{"spacing": "trailing"}')


@pytest.mark.parametrize(
    ("refine", "written"),
    [
        ({}, [("Refiner", "xl-refiner [0123456789]"), ("Refiner switch at", "0.8")]),
        ({"at": 0.6}, [("Refiner", "xl-refiner [0123456789]"), ("Refiner switch at", "0.6")]),
        ({"strength": 0.3, "steps": 9},
         [("Refiner", "xl-refiner [0123456789]"), ("Refine", '{"strength": 0.3, "steps": 9}')]),
    ],
)  # fmt: skip
def test_a_refiner(refine: dict[str, float], written: list[tuple[str, str]]) -> None:
    """Under the web UI's keys, the rest under our own; read back it is known by its name."""
    request = Request.of(prompt="a", refine={"model": "models/xl-refiner.safetensors", **refine})
    text = a1111.write(request, {"refiner_hash": "0123456789abcdef"})
    found = infotext.parse(text)
    assert [(key, found[key]) for key in found if key.startswith("Refine")] == written
    back = a1111_read.read(text).request.refine
    assert back is not None
    assert (back.model, back.at) == ("xl-refiner", refine.get("at", None if "strength" in refine else 0.8))
    assert (back.strength, back.steps) == (refine.get("strength"), refine.get("steps"))


def test_sizes_are_read_back() -> None:
    request = Request.of(prompt="a", sizes={"crop": "3x5", "negative_aesthetic_score": 2.0})
    assert a1111_read.read(a1111.write(request, {})).request.sizes == request.sizes


def test_any_model_can_be_named() -> None:
    assert dict(settings_of())["Model hash"] == "abc123def0"
    text = a1111.write(PLAIN, {"name": "a, b: c"})
    assert ', Model: "a, b: c", ' in text
    assert "Model hash" not in text


@pytest.mark.parametrize("sampler", sorted(load_all()))
def test_every_sampler_is_read_back(sampler: str) -> None:
    request = PLAIN.model_copy(update={"sampler": sampler})
    assert a1111_read.read(a1111.write(request, MODEL)).request == request


@pytest.mark.parametrize("spacing", sorted(SPACINGS))
def test_every_spacing_is_read_back(spacing: str) -> None:
    request = PLAIN.model_copy(update={"spacing": spacing})
    assert a1111_read.read(a1111.write(request, MODEL)).request == request


@settings(max_examples=60, deadline=None)
@given(samples.requests())
def test_every_request_is_read_back(request: Request) -> None:
    found = a1111_read.read(a1111.write(request, MODEL))
    assert found.request == request
    assert found.model == {"name": "dreamshaper_8", "hash": "abc123def0"}
    assert found.program == VERSION
    assert all(note.startswith("Adapter: ") for note in found.notes)
