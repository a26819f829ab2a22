"""`parameters` texts of AUTOMATIC1111 and of those who write like it."""

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.engine.metadata import a1111, infotext
from reverie.engine.metadata.a1111_read import MOST_TEXT, read
from reverie.errors import RequestError
from tests.engine.metadata import samples

BASE = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512"
NEW = f"{BASE}, Schedule type: Automatic, Version: v1.10.1"


def fields(last: str, words: str = "a cat") -> dict[str, Any]:
    """The fields that a text sets, but for those that every text of the web UI sets."""
    found = read(f"{words}\n{last}").fields
    common = {"prompt": words, "steps": 20, "guidance_scale": 7.0, "seed": 1, "width": 512, "height": 512,
              "preset": "a1111", "sampler": "euler_a", "rng": "philox"}  # fmt: skip
    return {name: value for name, value in found.items() if common.get(name, ...) != value}


def notes(last: str) -> tuple[str, ...]:
    return read(f"a cat\n{last}").notes


def test_a_whole_text() -> None:
    found = read(samples.A1111)
    assert found.fields == {
        "preset": "a1111", "prompt": "a castle on a hill, <lora:castle:0.8>\nat dusk",
        "negative_prompt": "blurry\nugly", "steps": 20, "sampler": "euler_a", "spacing": "karras",
        "guidance_scale": 6.5, "seed": 12345, "width": 512,
        "height": 768, "clip_skip": 2, "rng": "philox",
    }  # fmt: skip
    assert found.model == {"name": "dreamshaper_8", "hash": "abc123def0"}
    assert found.program == "AUTOMATIC1111 v1.10.1"
    assert found.notes == ("Adapter: <lora:castle:0.8> (it stays in the prompt; its file is looked for by that name)",)
    assert not found.own


def test_sd_parsers_reads_the_same(tmp_path: Path) -> None:
    theirs = samples.sd_parsers_of(samples.png(tmp_path / "a.png", {"parameters": samples.A1111}))
    ours = read(samples.A1111)
    sampler = theirs.samplers[0]
    assert sampler.prompts[0].value == ours.request.prompt
    assert sampler.negative_prompts[0].value == ours.request.negative_prompt
    assert int(sampler.parameters["steps"]) == ours.request.steps
    assert int(sampler.parameters["seed"]) == ours.request.seed
    assert float(sampler.parameters["cfg_scale"]) == ours.request.guidance_scale
    assert sampler.model.name == ours.model["name"]
    assert sampler.model.hash == ours.model["hash"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("Schedule type: SGM Uniform", {"spacing": "sgm_uniform"}),
        ("Image CFG scale: 1.5", {"image_guidance_scale": 1.5}),
        ("Variation seed: 5, Variation seed strength: 0.2", {"variation_seed": 5, "variation_strength": 0.2}),
        ("Seed resize from: 512x384", {"seed_width": 512, "seed_height": 384}),
        ("Denoising strength: 0.6", {"strength": 0.6}),
        ("Clip skip: 2, ENSD: 31337", {"clip_skip": 2, "eta_noise_delta": 31337}),
        ("RNG: CPU", {"rng": "cpu"}), ("RNG: NV", {}), ("Tiling: True", {"seamless": "both"}),
        ("Mask blur: 4, Inpaint area: Only masked, Masked area padding: 64, Masked content: latent noise",
         {"mask_blur": 4.0, "mask_area": "masked", "mask_padding": 64, "mask_fill": "noise"}),
        ("Mask mode: Inpaint not masked", {"mask_invert": True}),
        ("Eta: 0.67", {"eta": 0.67}), ("Eta DDIM: 0.5", {"eta": 0.5}),
        ("Sigma churn: 1, Sigma tmin: 0.1, Sigma tmax: 9, Sigma noise: 1.05",
         {"sampler_options": {"s_churn": 1, "s_tmin": 0.1, "s_tmax": 9, "s_noise": 1.05}}),
        ("Discard penultimate sigma: True", {"discard_penultimate": True}),
        ("Schedule rho: 5, Schedule min sigma: 0.1, Schedule max sigma: 9",
         {"spacing_options": {"rho": 5, "sigma_min": 0.1, "sigma_max": 9}}),
        ("Emphasis: No norm", {"emphasis": "no_norm"}),
        ("UniPC variant: bh2, UniPC order: 2", {"sampler_options": {"variant": "bh2", "order": 2}}),
    ],
)  # fmt: skip
def test_settings(more: str, expected: dict[str, Any]) -> None:
    assert fields(f"{NEW}, {more}") == expected
    assert notes(f"{NEW}, {more}") == ()


@pytest.mark.parametrize(("key", "value"), sorted(infotext.DEFAULTS.items()))
def test_what_a_missing_key_means_may_be_said(key: str, value: str) -> None:
    said = f"{key.removesuffix('-1')}: {value}x{value}" if key.endswith("-1") else f"{key}: {infotext.quoted(value)}"
    if not key.endswith("-2"):
        assert fields(f"{NEW}, {said}") == {}
        assert notes(f"{NEW}, {said}") == ()


HIRES = f"{NEW}, Denoising strength: 0.4"


@pytest.mark.parametrize(
    ("more", "hires"),
    [
        ("Hires upscale: 1.5", {"scale": 1.5}),
        ("Hires upscaler: Latent (nearest-exact)", {"upscaler": "latent_nearest_exact"}),
        ("Hires resize: 1024x768", {"width": 1024, "height": 768}),
        ("Hires resize: 1024x0", {"width": 1024}),
        ("Hires upscale: 2, Hires resize: 0x0", {"scale": 2.0}),
        ("Hires upscale: 2, Hires steps: 10, Hires CFG Scale: 3", {"scale": 2.0, "steps": 10, "guidance_scale": 3.0}),
        ("Hires upscale: 2, Hires steps: 0", {"scale": 2.0}),
        ("Hires upscale: 2, Hires sampler: DPM++ 2M Karras",
         {"scale": 2.0, "sampler": "dpmpp_2m", "spacing": "karras"}),
        ("Hires upscale: 2, Hires sampler: Euler, Hires schedule type: Simple",
         {"scale": 2.0, "sampler": "euler", "spacing": "simple"}),
        ("Hires upscale: 2, Hires sampler: Use same sampler, Hires checkpoint: Use same checkpoint", {"scale": 2.0}),
        ('Hires upscale: 2, Hires prompt: "a, b", Hires negative prompt: c',
         {"scale": 2.0, "prompt": "a, b", "negative_prompt": "c"}),
    ],
)  # fmt: skip
def test_a_hires_fix(more: str, hires: dict[str, Any]) -> None:
    assert fields(f"{HIRES}, {more}") == {"hires": {"strength": 0.4} | hires}


def test_no_hires_fix_without_a_strength() -> None:
    assert fields(f"{NEW}, Hires upscale: 2") == {}
    assert notes(f"{NEW}, Hires upscale: 2") == (
        "Hires upscale: 2 (there is no hires fix without a denoising strength)",
    )


@pytest.mark.parametrize(
    ("size", "first", "drawn", "resized"),
    [
        ("1024x1024", "512x512", (512, 512), (1024, 1024)),
        ("1024x1024", "0x0", (512, 512), (1024, 1024)),
        ("1920x1080", "0x0", (704, 384), (1920, 1080)),  # ceil(sqrt(512² / (1920 * 1080)) * side / 64) * 64
        ("512x2048", "0x0", (256, 1024), (512, 2048)),
    ],
)
def test_the_first_pass_of_old_versions(
    size: str, first: str, drawn: tuple[int, int], resized: tuple[int, int]
) -> None:
    last = f"{HIRES.replace('512x512', size)}, First pass size: {first}"
    request = read(f"a cat\n{last}").request
    assert (request.width, request.height) == drawn
    assert request.hires is not None
    assert (request.hires.width, request.hires.height) == resized


@pytest.mark.parametrize(
    ("label", "version", "expected"),
    [
        ("DPM++ 2M Karras", "v1.5.1", {"sampler": "dpmpp_2m", "spacing": "karras"}),
        ("DPM++ 2M SDE Exponential", "v1.6.0", {"sampler": "dpmpp_2m_sde", "spacing": "exponential"}),
        ("DPM++ 3M SDE Karras", "v1.8.0", {"sampler": "dpmpp_3m_sde", "spacing": "karras"}),
        ("LMS Karras", "v1.2.0", {"sampler": "lms", "spacing": "karras"}),
        ("DPM2 a Karras", "v1.2.0", {"sampler": "dpm_2_a", "spacing": "karras"}),
        ("DPM++ 2M", "v1.8.0", {"sampler": "dpmpp_2m", "spacing": "uniform"}),  # then a bare label was just that
        ("DPM++ 2M", "v1.9.0", {"sampler": "dpmpp_2m"}),
        ("DPM++ 2M", "1.8.0-RC", {"sampler": "dpmpp_2m", "spacing": "uniform"}),
        ("DPM++ 2M", None, {"sampler": "dpmpp_2m", "spacing": "uniform"}),
        ("DPM++ 2M", "0a1b2c3", {"sampler": "dpmpp_2m"}),
        ("DDIM", "v1.5.1", {"sampler": "ddim"}),
        ("Restart", "v1.6.0", {"sampler": "restart"}),
        ("k_dpmpp_2m_ka", "v1.10.0", {"sampler": "dpmpp_2m", "spacing": "karras"}),
    ],
)
def test_samplers_of_all_versions(label: str, version: str | None, expected: dict[str, str]) -> None:
    last = BASE.replace("Euler a", label) + (f", Version: {version}" if version else "")
    assert fields(last) == expected


OLD = "before 1.7.0-225 it kept alphas_cumprod in half precision"
TIMELINES = "before 1.6 its hires pass ran the prompt's schedule once more"
PADDING = "before 1.6 its DDIM and PLMS padded prompts in another way"


@pytest.mark.parametrize(
    ("words", "more", "reasons"),
    [
        ("a cat", "Version: v1.10.1", []), ("a cat", "Version: v1.7.0-225-gabc", []), ("a cat", "Version: 0a1b2c3", []),
        ("a cat", "Version: v1.7.0-224-gabc", [OLD]), ("a cat", "Version: v1.6.0", [OLD]), ("a cat", "ENSD: 1", [OLD]),
        ("a cat", "Version: f2.0.1v1.10.1-previous-1-gabc", []),
        ("a [cat:dog:0.5]", "Denoising strength: 0.5, Hires upscale: 2, Version: v1.5.2", [TIMELINES, OLD]),
        ("a [cat:dog:0.5]", "Version: v1.5.2", [OLD]),
        ("a [cat:dog:0.5]", "Denoising strength: 0.5, Hires upscale: 2, Version: v1.6.0", [OLD]),
    ],
)  # fmt: skip
def test_what_old_versions_did_otherwise(words: str, more: str, reasons: list[str]) -> None:
    found = read(f"{words}\n{BASE}, {more}").notes
    assert [note.partition(" (")[2].removesuffix(")") for note in found] == reasons


def test_old_ddim() -> None:
    found = read(f"a cat\n{BASE.replace('Euler a', 'DDIM')}, Version: v1.5.1").notes
    assert found == (f"Version: v1.5.1 ({PADDING})", f"Version: v1.5.1 ({OLD})")


def test_a_hypernetwork_goes_into_the_prompt() -> None:
    found = read(f"a cat\n{NEW}, Hypernet: anime, Hypernet strength: 0.5")
    assert found.request.prompt == "a cat<hypernet:anime:0.5>"
    assert found.notes[0].startswith("Adapter: <hypernet:anime:0.5> ")
    assert read(f"a cat\n{NEW}, Hypernet: anime").request.prompt == "a cat<hypernet:anime:1.0>"


@pytest.mark.parametrize(
    ("more", "refine"),
    [
        (
            "Refiner: sd_xl_refiner_1.0 [7440042bbd], Refiner switch at: 0.75",
            {"model": "sd_xl_refiner_1.0", "at": 0.75},
        ),
        ("Refiner: a [b] c, Refiner switch by sampling steps: True", {"model": "a [b] c"}),
        ("Refiner: never, Refiner switch at: 1.0", None),
    ],
)
def test_a_refiner(more: str, refine: dict[str, Any] | None) -> None:
    found = read(f"{NEW}, {more}")
    assert found.fields.get("refine") == refine
    assert not found.notes


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ("VAE: x.pt", "VAE: x.pt (the model's own VAE draws)"),
        ("Refiner: xl, Refiner switch at: 2", "refine.at: 2 (input should be less than 1)"),
        ('ControlNet 0: "Module: canny, Weight: 1"',
         "ControlNet 0: Module: canny, Weight: 1 "
         "(the picture it follows is not in the metadata; give it with --control)"),
        ("Token merging ratio hr: 0.5", "Token merging ratio hr: 0.5 (there is no such setting here)"),
        ("Postprocess upscaler: 4x-Ultra",
         "Postprocess upscaler: 4x-Ultra (there is no such upscaler here; give its file)"),
        ("RNG: dice", "RNG: dice (there is no such source of random numbers here)"),
        ("Schedule type: GITS 9", "Schedule type: GITS 9 (there is no such spacing here; the model's own is used)"),
        ("Init image hash: 0123",
         "Init image hash: 0123 (the picture itself is not in the metadata; give it with --image)"),
        ("Masked content: glue", "mask_fill: glue (input should be 'original', 'fill', 'noise' or 'zero')"),
        ("Eta: 7", "eta: 7 (input should be less than or equal to 1)"),
        ("Clip skip: two", "clip_skip: two (input should be a valid integer, unable to parse string as an integer)"),
        ("Sigma tmax: inf", "sampler_options: {'s_tmax': inf} (not a finite number)"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_is_noted(more: str, note: str) -> None:
    assert notes(f"{NEW}, {more}") == (note,)


def test_numbers_out_of_range_are_noted() -> None:
    huge = "9" * 5000
    found = read(f"a cat\nSteps: {huge}, Sampler: Euler, CFG scale: nan, Seed: {huge}, Size: {huge}x7")
    assert found.fields.keys() == {"preset", "prompt", "sampler", "spacing", "rng"}
    noted = {note.partition(":")[0] for note in found.notes}
    assert noted == {"steps", "guidance_scale", "seed", "width", "height", "Version"}


CIVITAI = """\
a cat
Negative prompt: rain
Steps: 25, Sampler: Undefined, CFG scale: 3.5, Seed: 1, Size: 832x1216, Clip skip: 2, \
Created Date: 2025-11-28T09:18:43.5269343Z, Civitai resources: \
[{"type":"checkpoint","modelVersionId":691639,"modelName":"FLUX, dev: 1"},{"type":"lora","weight":0.8}], \
Civitai metadata: {}"""


def test_civitai() -> None:
    found = read(CIVITAI)
    assert found.program == "Civitai"
    assert found.fields == {
        "prompt": "a cat", "negative_prompt": "rain", "steps": 25, "guidance_scale": 3.5, "seed": 1, "width": 832,
        "height": 1216, "clip_skip": 2,
    }  # fmt: skip
    assert found.notes == ("Sampler: Undefined (there is no such sampler here; the model's own is used)",)


@pytest.mark.parametrize(
    ("more", "program", "preset", "dialect"),
    [
        ("Version: ComfyUI", "ComfyUI", "comfy", "comfy"),
        ("Version: Fooocus v2.5.0", "Fooocus v2.5.0", "comfy", "comfy"),
        ("App: SD.Next, Version: 0a1b2c3", "SD.Next", "diffusers", "a1111"),
        ("RNG: cuda, Version: stable-diffusion.cpp", "stable-diffusion.cpp", None, "a1111"),
        ("Version: f2.0.1v1.10.1", "AUTOMATIC1111 f2.0.1v1.10.1", "a1111", "a1111"),
    ],
)
def test_others_who_write_like_it(more: str, program: str, preset: str | None, dialect: str) -> None:
    found = read(f"a cat\n{BASE}, {more}")
    assert (found.program, found.request.preset, found.request.dialect) == (program, preset, dialect)


def test_fooocus_names_its_scheduler() -> None:
    assert fields(f"{BASE.replace('Euler a', 'DPM++ 2M SDE Karras')}, Scheduler: karras, Version: Fooocus v2.5.0") == {
        "sampler": "dpmpp_2m_sde", "spacing": "karras", "preset": "comfy", "dialect": "comfy",
    }  # fmt: skip


@pytest.mark.parametrize("words", ["a {red|blue} cat", "a __colour__ cat"])
def test_wildcards_of_a_finished_picture_are_words(words: str) -> None:
    assert fields(NEW, words) == {"dynamic_prompts": False}


def test_words_alone() -> None:
    found = read("just\nwords")
    assert found.fields == {"prompt": "just\nwords"}
    assert found.notes == ()


def test_own_text_that_was_tampered_with() -> None:
    found = read(f'a cat\n{BASE}, Guides: "[1]", Tiles: "[2]", Extend: 3, Version: Reverie 0.1.0')
    assert {note.partition(":")[0] for note in found.notes} == {"guides", "tiles", "extend"}


def test_a_text_that_is_too_long() -> None:
    with pytest.raises(RequestError, match=r"262,145 characters; at most 262,144"):
        read("x" * (MOST_TEXT + 1))


KEYS = ["Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model", "Model hash", "Denoising strength",
        "Hires upscale", "Hires resize", "Hires prompt", "Clip skip", "RNG", "Version", "Sigma churn", "Tiling",
        "Preset", "Tiles", "Guides", "Hires", "Mask blur", "Eta", "First pass size", "Hypernet", "Variation seed",
        "Upscaler"]  # fmt: skip
VALUES = ["20", "0", "-1", "0.5", "Euler a", "DPM++ 2M Karras", "Karras", "512x512", "0x0", "a, b", "[1]",
          '{"size": 9}', "True", "nan", "v1.5.1", "Reverie 0.1.0", "ComfyUI", "NV", "comfy", "\ud800", ""]  # fmt: skip
pairs = st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES) | st.text(max_size=8)), max_size=12)
texts = st.builds(
    lambda words, negative, settings: "\n".join([words, negative, ", ".join(f"{k}: {v}" for k, v in settings)]),
    st.text(max_size=30), st.text(max_size=30).map("Negative prompt: {}".format), pairs,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(texts)
def test_whatever_is_read_is_written_stably(text: str) -> None:
    found = read(text)
    once = a1111.write(found.request, found.model)
    again = read(once)
    assert a1111.write(again.request, again.model) == once


LONG = MOST_TEXT - 100
HOSTILE = {
    "one key": "a" * LONG, "keys": "ab: c, " * (LONG // 7), "short keys": "a:" * (LONG // 2), "spaces": " " * LONG,
    "quotes": 'ab: "x, ' * (LONG // 8), "escapes": 'ab: "\\", ' * (LONG // 9), "lists": "ab:[1," * (LONG // 6),
    "lists of text": 'ab:["",' * (LONG // 7), "objects": 'ab:{"a":' * (LONG // 8), "deep": "ab: " + "[" * LONG,
    "negative": "Negative prompt:" * (LONG // 16), "lines": "\n" * LONG, "adapters": "<lora:" * (LONG // 6),
    "dashes": "-/ " * (LONG // 3), "different": ", ".join(f"key {i}: {i}" for i in range(LONG // 20)),
    "label": f"{BASE}, Sampler: {'x' * LONG}", "number": f"{BASE}, Seed: {'9' * LONG}", "words": "word " * (LONG // 5),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_texts_take_linear_time(kind: str) -> None:
    started = time.process_time()
    found = read(HOSTILE[kind])
    assert time.process_time() - started < 2
    assert len(found.notes) <= 101
    assert all(len(note) < 300 for note in found.notes)
