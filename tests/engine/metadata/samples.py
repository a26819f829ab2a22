"""Metadata as programs write them, pictures that carry them, and requests of every kind."""

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from reverie.diffusion.spacing import SPACINGS
from reverie.engine.request import MAX_SEED, Extend, Guide, Hires, Micro, Refine, Request, Tiles, Travel
from reverie.sampling.registry import load_all

A1111 = """\
a castle on a hill, <lora:castle:0.8>
at dusk
Negative prompt: blurry
ugly
Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 6.5, Seed: 12345, Size: 512x768, \
Model hash: abc123def0, Model: dreamshaper_8, Clip skip: 2, Lora hashes: "castle: deadbeefdead", Version: v1.10.1"""

Json = dict[str, Any]


def png(path: Path, chunks: dict[str, str]) -> Path:
    """A PNG with these text chunks."""
    info = PngInfo()
    for name, text in chunks.items():
        info.add_text(name, text)
    Image.new("RGB", (16, 16)).save(path, pnginfo=info)
    return path


def sd_parsers_of(path: Path) -> Any:
    """What the package sd_parsers reads: prompts, negative prompts, sampler and its parameters."""
    from sd_parsers import ParserManager

    found = ParserManager().parse(path)
    assert found is not None
    return found


def comfy(**changes: Json) -> Json:
    """The graph of ComfyUI's first example; `n3=...` puts another node in the place of 3."""
    nodes: dict[str, Any] = {
        "3": {"class_type": "KSampler", "inputs": {
            "seed": 156680208700286, "steps": 20, "cfg": 8.0, "sampler_name": "euler_ancestral", "scheduler": "normal",
            "denoise": 1.0, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (red:1.2) bottle", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "watermark", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    }  # fmt: skip
    return nodes | {number.removeprefix("n"): changed for number, changed in changes.items()}


def node(kind: str, **inputs: Any) -> Json:
    """One node of such a graph."""
    return {"class_type": kind, "inputs": inputs}


def with_inputs(graph: Json, number: str, **inputs: Any) -> Json:
    """The graph with some inputs of a node otherwise."""
    old = graph[number]
    return graph | {number: old | {"inputs": old["inputs"] | inputs}}


def text_of(graph: Json) -> str:
    """Its JSON."""
    return json.dumps(graph)


words = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=40).map(
    lambda text: " ".join(text.split())
)
lines = st.lists(words.filter(lambda line: line and not line.startswith("Negative prompt:")), max_size=3).map("\n".join)
pixels = st.integers(8, 8192)
numbers = st.floats(0, 1)
scales = st.floats(0, 100)
seeds = st.integers(0, MAX_SEED)
options = st.dictionaries(
    st.sampled_from(["s_churn", "s_noise", "order", "rho", "sigma_max", "alpha", "other"]),
    st.floats(0.1, 9) | st.integers(1, 9),
)
samplers = st.sampled_from(sorted(load_all()))
spacings = st.sampled_from(sorted(SPACINGS))
maybe_words = st.none() | lines
pairs = st.none() | st.tuples(st.integers(0, 65536), st.integers(0, 65536))
scores = st.none() | st.floats(0, 10)
refiners = st.sampled_from(["xl-refiner", "a [b] c", "x, y"])
groups: dict[str, st.SearchStrategy[Any]] = {
    "sizes": st.builds(Micro, original_size=pairs, crop=pairs, negative_target_size=pairs, aesthetic_score=scores),
    "refine": st.builds(Refine, model=refiners, at=st.floats(0.01, 0.99), guidance_scale=st.none() | scales)
    | st.builds(Refine, model=refiners, strength=st.floats(0.01, 1), steps=st.none() | st.integers(1, 1000)),
    "extend": st.builds(Extend, left=st.integers(0, 4096)),
    "tiles": st.builds(Tiles, size=pixels),
    "travel": st.builds(Travel, frames=st.integers(2, 1000), prompt=maybe_words, seed=st.none() | seeds),
    "hires": st.builds(
        Hires, scale=st.floats(1, 8), width=st.none() | pixels, height=st.none() | pixels, strength=numbers,
        upscaler=st.sampled_from(["latent", "latent_bicubic_antialiased", "lanczos", "/4x, best.pth"]),
        steps=st.none() | st.integers(1, 1000), sampler=st.none() | samplers, spacing=st.none() | spacings,
        guidance_scale=st.none() | scales, prompt=maybe_words, negative_prompt=maybe_words,
    ),
}  # fmt: skip
fields: dict[str, st.SearchStrategy[Any]] = {
    "prompt": lines, "negative_prompt": lines, "dialect": st.sampled_from(["a1111", "comfy", "compel", "plain"]),
    "emphasis": st.sampled_from(["original", "no_norm", "ignore", "none"]),
    "comma_backtrack": st.none() | st.integers(0, 75),
    "clip_skip": st.integers(1, 12), "dynamic_prompts": st.none() | st.booleans(), "width": pixels, "height": pixels,
    "count": st.integers(1, 1000), "only": st.none() | st.integers(0, 999),
    "seamless": st.sampled_from(["none", "x", "y", "both"]), "upscaler": st.sampled_from([None, "none", "/a: b,c.pth"]),
    "seed": seeds, "variation_seed": st.none() | seeds, "variation_strength": numbers, "seed_width": st.none() | pixels,
    "seed_height": st.none() | pixels, "rng": st.sampled_from(["cpu", "philox", "device"]), "eta_noise_delta": seeds,
    "preset": st.sampled_from([None, "a1111", "comfy", "diffusers"]), "steps": st.integers(1, 1000),
    "sampler": samplers, "spacing": spacings, "eta": st.none() | numbers, "sampler_options": options,
    "spacing_options": options,
    "sigmas": st.none() | st.lists(st.floats(0, 100), min_size=1, max_size=4).map(tuple),
    "discard_penultimate": st.none() | st.booleans(), "guidance_scale": scales, "guidance_rescale": numbers,
    "guidance_start": numbers, "guidance_end": numbers, "guidance_curve": st.sampled_from(["constant", "1,7,3"]),
    "guides": st.lists(st.builds(Guide, name=st.just("pag"), options=options), max_size=2).map(tuple),
    "image_guidance_scale": st.none() | scales, "strength": st.none() | numbers,
    "strength_steps": st.sampled_from([None, "a1111_fixed"]), "resize": st.sampled_from(["stretch", "crop"]),
    "mask_invert": st.booleans(), "mask_blur": st.floats(0, 256), "mask_area": st.sampled_from(["whole", "masked"]),
    "mask_padding": st.integers(0, 4096), "mask_fill": st.sampled_from(["original", "fill", "noise", "zero"]),
    "keep_unmasked": st.booleans(), "noise_level": st.none() | st.integers(0, 999),
    "encoding": st.sampled_from([None, "mean"]),
    **{name: st.none() | group for name, group in groups.items()},
}  # fmt: skip
own_fields: dict[str, st.SearchStrategy[Any]] = {  # the text of A1111 has no place for these
    "image": st.sampled_from([None, "photo.png"]), "mask": st.sampled_from([None, "mask.png"]),
    "wildcards": st.sampled_from([None, "cards"]), "batch_size": st.integers(1, 64),
    "vae_tile": st.none() | st.integers(0, 8192),
}  # fmt: skip


def requests(**more: st.SearchStrategy[Any]) -> st.SearchStrategy[Request]:
    """Resolved requests with any of their fields set."""
    always = {"prompt", "seed", "steps", "sampler", "spacing", "guidance_scale", "width", "height", "rng"}
    required = {name: strategy for name, strategy in fields.items() if name in always}
    optional = {name: strategy for name, strategy in (fields | more).items() if name not in always}
    return st.fixed_dictionaries(required, optional=optional).map(lambda chosen: Request.of(**chosen))
