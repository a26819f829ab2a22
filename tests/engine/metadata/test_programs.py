"""Pictures of the programs that write a table of settings: InvokeAI, NovelAI, Fooocus, SwarmUI, Draw Things, ..."""

import html
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.engine.metadata import drawthings, easydiffusion, fooocus, invoke, novelai, swarm
from reverie.engine.metadata.report import Found, Notes
from reverie.errors import RequestError
from tests.engine.metadata import samples

INVOKE = {
    "app_version": "4.2.0", "generation_mode": "txt2img", "positive_prompt": "a lighthouse, dusk++",
    "negative_prompt": "fog", "width": 512, "height": 768, "seed": 777, "rand_device": "cpu", "cfg_scale": 7.5,
    "cfg_rescale_multiplier": 0, "steps": 25, "scheduler": "euler_k", "clip_skip": 1, "seamless_x": True,
    "model": {"key": "k", "hash": "sha256:abc", "name": "dreamshaper", "base": "sd-1", "type": "main"},
    "positive_style_prompt": "a lighthouse, dusk++", "negative_style_prompt": "", "controlnets": [], "loras": [],
}  # fmt: skip
INVOKE_2: dict[str, Any] = {
    "model": "stable diffusion", "model_weights": "stable-diffusion-1.5", "model_hash": "cc61", "app_version": "2.3.0",
    "app_id": "invoke-ai/InvokeAI",
    "image": {"prompt": [{"prompt": "a boat [storm, dark] at sea [fog]", "weight": 1.0}], "steps": 50, "cfg_scale": 7.5,
              "threshold": 0, "perlin": 0.1, "height": 512, "width": 640, "seed": 1234, "seamless": True,
              "hires_fix": False, "type": "txt2img", "postprocessing": None, "sampler": "k_lms", "variations": []},
}  # fmt: skip
DREAM = '"a "fine" boat [storm]" -s 50 -S 1234 -W 512 -H 640 -C 7.5 -A k_euler_a --seamless --threshold 2'
NOVELAI = {
    "Title": "AI generated image", "Description": "1girl, {{best}} quality", "Software": "NovelAI",
    "Source": "Stable Diffusion XL C1E1DE52",
    "Comment": json.dumps({
        "prompt": "1girl, {{best}} quality", "steps": 28, "height": 1216, "width": 832, "scale": 5.5,
        "cfg_rescale": 0.2, "uncond_scale": 1.0, "seed": 999, "n_samples": 1, "noise_schedule": "karras",
        "sampler": "k_euler_ancestral",
        "sm": True, "sm_dyn": False, "uc": "lowres", "request_type": "PromptGenerateRequest", "signed_hash": "x=="}),
}  # fmt: skip
FOOOCUS = {
    "adm_guidance": "(1.5, 0.8, 0.3)", "base_model": "juggernautXL_v8", "base_model_hash": "aeb7e9e6",
    "full_negative_prompt": ["unrealistic", "saturated"], "full_prompt": ["cinematic still an astronaut", "a horse"],
    "guidance_scale": 4, "lora_combined_1": "offset : 0.1", "loras": [["offset", 0.1, "4852"]], "negative_prompt": "",
    "performance": "Speed", "prompt": "an astronaut on a horse", "refiner_model": "None", "refiner_switch": 0.5,
    "resolution": "(1152, 896)", "sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras", "seed": "42", "sharpness": 2,
    "steps": 30, "styles": "['Fooocus V2']", "vae": "Default (model)", "version": "Fooocus v2.5.0", "clip_skip": 2,
}  # fmt: skip
SWARM: dict[str, Any] = {
    "sui_image_params": {
        "prompt": "a photo of a cat", "negativeprompt": "dog", "model": "xl/sd_xl_base_1.0", "seed": 1, "steps": 20,
        "cfgscale": 7.0, "aspectratio": "Custom", "width": 1024, "height": 768, "sampler": "dpmpp_2m",
        "scheduler": "karras", "clipstopatlayer": -2, "seamlesstileable": "X-Only", "variationseed": 5,
        "variationseedstrength": 0.25, "swarm_version": "0.9.3.1", "loras": ["x"], "loraweights": ["0.8"]},
    "sui_extra_data": {"date": "2025-01-25"},
    "sui_models": [{"name": "xl/x.safetensors", "param": "loras", "hash": "0xff"},
                   {"name": "xl/sd_xl_base_1.0.safetensors", "param": "model", "hash": "0xd7a9"}],
}  # fmt: skip
DRAW_THINGS = {
    "c": 'a "watercolour" fox & hound', "uc": "photo", "model": "dreamshaper_v8_q6p_q8p.ckpt",
    "sampler": "DPM++ 2M Karras", "scale": 6.5, "seed": 31337, "seed_mode": "Torch CPU Compatible", "size": "512x640",
    "steps": 22, "strength": 1,
    "lora": [{"model": "x.ckpt", "weight": 0.6}], "control": [], "hires_fix": False, "v2": {"width": 512},
}  # fmt: skip
EASY = {
    "prompt": "a desert oasis", "negative_prompt": "cactus", "seed": "2024", "clip_skip": "True",
    "use_stable_diffusion_model": "C:\\models\\sd-v1-5.ckpt", "use_vae_model": "None", "sampler_name": "euler_a",
    "width": "512", "height": "640", "num_inference_steps": "25", "guidance_scale": "7.5", "tiling": "xy",
    "use_lora_model": "['x']", "use_face_correction": "None",
}  # fmt: skip


def xmp(settings_: Any, tool: str = "Draw Things") -> str:
    text = html.escape(json.dumps(settings_))
    words = f'<rdf:Description xmp:CreatorTool="{tool}"><dc:description>a fox</dc:description>'
    comment = f'<rdf:Alt><rdf:li xml:lang="x-default">{text}</rdf:li></rdf:Alt>'
    return f"<x:xmpmeta>{words}<exif:UserComment>{comment}</exif:UserComment></x:xmpmeta>"


EXPECTED: dict[str, tuple[Found, dict[str, Any], dict[str, str], list[str]]] = {
    "InvokeAI 4.2.0": (
        invoke.read({"invokeai_metadata": json.dumps(INVOKE), "Dream": "old"}),
        {"preset": "diffusers", "dialect": "compel", "prompt": "a lighthouse, dusk++", "negative_prompt": "fog",
         "seed": 777, "steps": 25, "guidance_scale": 7.5, "guidance_rescale": 0.0, "width": 512, "height": 768,
         "sampler": "euler", "spacing": "karras", "clip_skip": 2, "seamless": "x"},
        {"name": "dreamshaper", "hash": "abc"}, [],
    ),
    "InvokeAI 2.3.0": (
        invoke.read({"sd-metadata": json.dumps(INVOKE_2)}),
        {"preset": "diffusers", "dialect": "compel", "prompt": "a boat at sea", "negative_prompt": "storm, dark, fog",
         "seed": 1234, "steps": 50, "guidance_scale": 7.5, "width": 640, "height": 512, "sampler": "lms",
         "seamless": "both"},
        {"name": "stable-diffusion-1.5", "hash": "cc61"}, ["perlin: 0.1 (Perlin noise is not drawn)"],
    ),
    "InvokeAI": (
        invoke.read({"Dream": DREAM}),
        {"preset": "diffusers", "dialect": "compel", "prompt": 'a "fine" boat', "negative_prompt": "storm",
         "seed": 1234, "steps": 50, "guidance_scale": 7.5, "width": 512, "height": 640, "sampler": "euler_a",
         "seamless": "both"},
        {}, ["threshold: 2 (thresholding is not drawn here)"],
    ),
    "NovelAI": (
        novelai.read(NOVELAI),
        {"prompt": "1girl, ((best:1.05):1.05) quality", "negative_prompt": "lowres", "seed": 999, "steps": 28,
         "guidance_scale": 5.5, "guidance_rescale": 0.2, "width": 832, "height": 1216, "clip_skip": 2,
         "eta_noise_delta": 31337, "sampler": "euler_a", "spacing": "karras"},
        {"name": "Stable Diffusion XL", "hash": "c1e1de52"}, ["sm: true (SMEA is not drawn here)"],
    ),
    "Fooocus v2.5.0": (
        fooocus.read(json.dumps(FOOOCUS)),
        {"preset": "comfy", "dialect": "comfy", "prompt": "cinematic still an astronaut, a horse",
         "negative_prompt": "unrealistic, saturated", "seed": 42, "steps": 30, "guidance_scale": 4.0, "width": 1152,
         "height": 896, "clip_skip": 2, "sampler": "dpmpp_2m_sde", "spacing": "karras",
         "loras": ({"path": "offset", "strength": 0.1},)},
        {"name": "juggernautXL_v8", "hash": "aeb7e9e6"},
        ["adm_guidance: (1.5, 0.8, 0.3) (its shift of size conditioning is not done here)",
         "sharpness: 2 (its sharpening of noise is not done here)", "vae: Default (model) (the model's own VAE draws)"],
    ),
    "SwarmUI 0.9.3.1": (
        swarm.read(json.dumps(SWARM)),
        {"preset": "comfy", "dialect": "comfy", "prompt": "a photo of a cat", "negative_prompt": "dog", "seed": 1,
         "steps": 20, "guidance_scale": 7.0, "width": 1024, "height": 768, "sampler": "dpmpp_2m", "spacing": "karras",
         "clip_skip": 2, "seamless": "x", "variation_seed": 5, "variation_strength": 0.25,
         "loras": ({"path": "x", "strength": 0.8},)},
        {"name": "xl/sd_xl_base_1.0", "hash": "d7a9"}, [],
    ),
    "Draw Things": (
        drawthings.read(xmp(DRAW_THINGS)),
        {"prompt": 'a "watercolour" fox & hound', "negative_prompt": "photo", "seed": 31337, "steps": 22,
         "guidance_scale": 6.5, "width": 512, "height": 640, "sampler": "dpmpp_2m", "spacing": "karras", "rng": "cpu",
         "loras": ({"path": "x.ckpt", "strength": 0.6},)},
        {"name": "dreamshaper_v8_q6p_q8p.ckpt"}, [],
    ),
    "Easy Diffusion": (
        easydiffusion.read(EASY, "text"),
        {"prompt": "a desert oasis", "negative_prompt": "cactus", "seed": 2024, "steps": 25, "guidance_scale": 7.5,
         "width": 512, "height": 640, "sampler": "euler_a", "clip_skip": 2, "seamless": "both",
         "loras": ({"path": "x", "strength": 1.0},)},
        {"name": "sd-v1-5.ckpt"}, [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", EXPECTED)
def test_what_is_carried_and_what_is_noted(program: str) -> None:
    found, fields, model, notes = EXPECTED[program]
    assert found.program == program
    assert found.fields == fields
    assert found.model == model
    assert list(found.notes) == notes


@pytest.mark.parametrize(
    ("chunks", "read"),
    [
        ({"invokeai_metadata": json.dumps(INVOKE | {"model": {"model_name": "dreamshaper"}})}, invoke.read),
        ({"sd-metadata": json.dumps(INVOKE_2)}, invoke.read), ({"Dream": DREAM.replace('"fine" ', "")}, invoke.read),
        (NOVELAI | {"Description": "1girl"}, novelai.read),
        ({"parameters": json.dumps(FOOOCUS | {"full_prompt": [], "full_negative_prompt": []})},
         lambda chunks: fooocus.read(chunks["parameters"])),
    ],
)  # fmt: skip
def test_sd_parsers_reads_the_same(chunks: dict[str, str], read: Any, tmp_path: Path) -> None:
    theirs = samples.sd_parsers_of(samples.png(tmp_path / "a.png", chunks)).samplers[0]
    ours: Found = read(chunks)
    joined = " ".join(prompt.value for prompt in theirs.prompts)
    assert joined.split() == ours.request.prompt.split()
    assert ", ".join(prompt.value for prompt in theirs.negative_prompts) == ours.request.negative_prompt
    assert int(theirs.parameters["seed"]) == ours.request.seed
    assert float(theirs.parameters["cfg_scale"]) == ours.request.guidance_scale
    if theirs.model:
        assert theirs.model.name == ours.model["name"]


def test_invoke_names_of_older_versions() -> None:
    found = invoke.read({"invokeai_metadata": json.dumps(INVOKE | {
        "model": {"model_name": "old", "base_model": "sd-1"}, "seamless_y": True, "rand_device": "cuda", "clip_skip": 0,
        "positive_style_prompt": "oil", "hrf_enabled": True, "hrf_strength": 0.4, "hrf_width": 1024, "hrf_height": 1024,
        "loras": [{"model": {"name": "x"}, "weight": 0.7}, {"lora": {"model_name": "y"}, "weight": -0.2}],
        "refiner_model": {"name": "r"},
        "refiner_start": 0.6, "scheduler": "odd",
    })})  # fmt: skip
    request = found.request
    assert (found.model, request.seamless, request.rng, request.clip_skip) == ({"name": "old"}, "both", "philox", 1)
    assert found.fields["hires"] == {"width": 1024, "height": 1024, "strength": 0.4}
    assert [note.partition(":")[0] for note in found.notes] == ["scheduler", "positive_style_prompt"]
    assert found.fields["loras"] == ({"path": "x", "strength": 0.7}, {"path": "y", "strength": -0.2})
    assert found.fields["refine"] == {"model": "r", "at": 0.6}


@pytest.mark.parametrize(("method", "how"), [("StepSwap", {"at": 0.7}), ("PostApply", {"strength": 0.3})])
def test_refiners(method: str, how: dict[str, float]) -> None:
    """SwarmUI says how much is left, or drawn over; Fooocus and Draw Things when the other model takes over."""
    asked = {"refinermodel": "xl/r", "refinercontrolpercentage": 0.3, "refinermethod": method}
    found = swarm.read(json.dumps({"sui_image_params": SWARM["sui_image_params"] | asked}))
    assert found.fields["refine"] == {"model": "xl/r"} | how
    assert not [note for note in found.notes if note.startswith("refiner")]
    found = fooocus.read(json.dumps(FOOOCUS | {"refiner_model": "r.safetensors", "refiner_swap_method": "joint"}))
    assert found.fields["refine"] == {"model": "r.safetensors", "at": 0.5}
    found = drawthings.read(xmp(DRAW_THINGS | {"refiner_model": "r.ckpt", "refiner_start": 0.85}))
    assert found.fields["refine"] == {"model": "r.ckpt", "at": 0.85}


@pytest.mark.parametrize(
    ("words", "prompt", "negative"),
    [
        ("a boat", "a boat", ""),
        ("[fog] a boat [x] y", "a boat y", "fog, x"),
        ("a [b", "a [b", ""),
        ("[[a]]", "[ ]", "a"),
    ],
)
def test_the_negative_prompt_in_brackets(words: str, prompt: str, negative: str) -> None:
    assert invoke.split(words) == (prompt, negative)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("a {b} c", "a (b:1.05) c"), ("{{b}}", "((b:1.05):1.05)"), ("[b]", "(b:0.9524)"),
        ("{[b]}", "((b:0.9524):1.05)"), ("a (b) c", r"a \(b\) c"), ("{open", "{open"),
        ("close]", r"close\]"), ("{a]", r"{a\]"), ("[{a]}", r"\[(a\]:1.05)"),
    ],
)  # fmt: skip
def test_the_weights_of_novelai(theirs: str, ours: str) -> None:
    assert novelai.weighted(theirs, Notes()) == ours


def test_weights_of_novelai_that_are_not_read() -> None:
    notes = Notes()
    novelai.weighted("1.5::red::, {cat}", notes)
    assert notes.lines() == ("Description: 1.5::red::, {cat} (weights written as 1.5::words:: are not read)",)


def test_novelai_without_a_schedule_of_its_own() -> None:
    comment = {"prompt": "a cat", "uc": "", "noise_schedule": "native", "sampler": "ddim_v3", "scale": 5}
    found = novelai.read({"Comment": comment})
    assert (found.request.prompt, found.request.sampler, found.request.spacing) == ("a cat", "ddim", "uniform")


def test_draw_things_with_the_numbers_of_others() -> None:
    more = {"seed_mode": "NVIDIA GPU Compatible", "strength": 0.6, "sampler": "Euler A Trailing"}
    request = drawthings.read(xmp(DRAW_THINGS | more)).request
    assert (request.rng, request.strength, request.sampler, request.spacing) == ("philox", 0.6, "euler_a", "trailing")
    found = drawthings.read(xmp(DRAW_THINGS | {"seed_mode": "Scale Alike"}))
    assert "seed_mode: Scale Alike (its own random numbers are not drawn here)" in found.notes
    assert found.request.rng is None


def test_whose_xmp_it_is() -> None:
    assert drawthings.is_one(xmp(DRAW_THINGS))
    assert drawthings.is_one(xmp(DRAW_THINGS, tool=""))
    assert not drawthings.is_one(xmp({"prompt": "x"}, tool="Photoshop"))
    assert not drawthings.is_one("")


def test_easy_diffusion_in_the_words_of_its_files() -> None:
    words = {name: EASY[key] for name, key in easydiffusion.NAMES.items() if key in EASY}
    assert easydiffusion.is_one(words)
    assert easydiffusion.read(words, "").request == EXPECTED["Easy Diffusion"][0].request


def test_names_that_say_more_than_a_sampler() -> None:
    found = fooocus.read(json.dumps({"prompt": "a", "sampler": "uni_pc_bh2", "scheduler": "normal"}))
    assert (found.request.sampler, found.request.sampler_options) == ("unipc", {"variant": "bh2"})


def test_swarm_in_the_words_of_older_versions() -> None:
    old = {"prompt": "a", "comfyuisampler": "euler", "comfyuischeduler": "normal", "automaticvae": True}
    found = swarm.read(json.dumps({"sui_image_params": old}))
    assert (found.request.sampler, found.request.spacing, found.notes) == ("euler", "uniform", ())
    assert found.program == "SwarmUI"


DAMAGED = [
    lambda text: invoke.read({"invokeai_metadata": text}), lambda text: invoke.read({"sd-metadata": text}),
    lambda text: novelai.read({"Comment": text}), fooocus.read, swarm.read,
]  # fmt: skip


@pytest.mark.parametrize("read", DAMAGED)
@pytest.mark.parametrize("text", ["", "[]", "3", '"a"', "{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_damaged_metadata_give_one_line(read: Any, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (fooocus.read, "{}", "no prompt"), (swarm.read, '{"sui_image_params": 3}', "no object sui_image_params"),
        (lambda text: invoke.read({"sd-metadata": text}), '{"image": []}', "no object image"),
        (lambda text: invoke.read({"Dream": text}), 'a cat" -s 5', "no prompt in quotation marks"),
        (drawthings.read, xmp({}).replace("{", "("), "no JSON in its user comment"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(read: Any, text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        read(text)


TABLES: list[tuple[dict[str, Any], Any]] = [
    (INVOKE, lambda table: invoke.read({"invokeai_metadata": json.dumps(table)})),
    (INVOKE_2["image"], lambda table: invoke.read({"sd-metadata": json.dumps(INVOKE_2 | {"image": table})})),
    (json.loads(NOVELAI["Comment"]), lambda table: novelai.read(NOVELAI | {"Comment": json.dumps(table)})),
    (FOOOCUS, lambda table: fooocus.read(json.dumps({"prompt": ""} | table))),
    (SWARM["sui_image_params"], lambda table: swarm.read(json.dumps(SWARM | {"sui_image_params": table}))),
    (DRAW_THINGS, lambda table: drawthings.read(xmp(table))), (EASY, lambda table: easydiffusion.read(table, "")),
]  # fmt: skip
odd = st.sampled_from(["\ud800", "1e999", "-1"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | odd,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=4,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(TABLES), st.data())
def test_any_values_are_read(table: tuple[dict[str, Any], Any], data: st.DataObject) -> None:
    sample, read = table
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(sample)), values, max_size=6))
    found = read(sample | changes)
    assert all("\n" not in note for note in found.notes)
    assert found.request.model_validate(found.request.model_dump()) == found.request
