"""Pictures of ComfyUI."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.engine.metadata.comfy import read
from reverie.engine.metadata.report import Found
from reverie.errors import RequestError
from tests.engine.metadata import samples
from tests.engine.metadata.samples import Json, comfy, node, text_of, with_inputs

FIELDS = {
    "preset": "comfy", "dialect": "comfy", "prompt": "a (red:1.2) bottle", "negative_prompt": "watermark", "steps": 20,
    "seed": 156680208700286, "guidance_scale": 8.0, "sampler": "euler_a", "spacing": "uniform", "width": 512,
    "height": 768,
}  # fmt: skip
NO_IMAGE = "the picture itself is not in the metadata; give it with --image"


def found(graph: Json) -> Found:
    return read(text_of(graph))


def difference(graph: Json) -> dict[str, Any]:
    """What the graph's fields are otherwise than the example's; None for what it has not."""
    fields = found(graph).fields
    changed = {name: value for name, value in fields.items() if FIELDS.get(name, ...) != value}
    return changed | {name: None for name in FIELDS if name not in fields}


def reasons(graph: Json) -> list[str]:
    """Kind of node, and why it was not carried."""
    notes = found(graph).notes
    return [f"{note.split()[0].removesuffix(':')}: {note.rpartition(' (')[2].removesuffix(')')}" for note in notes]


def test_the_example() -> None:
    one = found(comfy())
    assert one.fields == FIELDS
    assert one.model == {"name": "v1-5.safetensors"}
    assert (one.program, one.notes, one.own) == ("ComfyUI", (), False)


def test_sd_parsers_reads_the_same(tmp_path: Path) -> None:
    links = [[1, 4, 0, 3, 0, "MODEL"], [2, 6, 0, 3, 1, "CONDITIONING"], [3, 7, 0, 3, 2, "CONDITIONING"]]
    chunks = {"prompt": text_of(comfy()), "workflow": json.dumps({"links": links})}
    theirs = samples.sd_parsers_of(samples.png(tmp_path / "a.png", chunks)).samplers[0]
    ours = found(comfy())
    assert theirs.parameters["seed"] == ours.request.seed
    assert theirs.parameters["steps"] == ours.request.steps
    assert theirs.parameters["cfg_scale"] == ours.request.guidance_scale
    assert theirs.name == "euler_ancestral"
    assert theirs.model.name == ours.model["name"]


SAMPLER = comfy()["3"]["inputs"]
CUSTOM = {"cfg": 5.0, "noise_seed": 7, "add_noise": True, "sampler": ["10", 0], "sigmas": ["11", 0],
          **{name: SAMPLER[name] for name in ("model", "positive", "negative", "latent_image")}}  # fmt: skip


@pytest.mark.parametrize(
    ("graph", "changes"),
    [
        (with_inputs(comfy(), "3", sampler_name="dpmpp_2m_sde_gpu", scheduler="karras"),
         {"sampler": "dpmpp_2m_sde", "spacing": "karras"}),
        (with_inputs(comfy(), "3", sampler_name="uni_pc_bh2"),
         {"sampler": "unipc", "sampler_options": {"variant": "bh2"}}),
        (comfy(n6=node("Reroute", **{"": ["10", 0]}), n10=node("CLIPTextEncode", text="a pear", clip=["4", 1])),
         {"prompt": "a pear"}),
        (comfy(n6=node("CLIPTextEncode", text=["10", 0], clip=["4", 1]), n10=node("PrimitiveString", value="a pear")),
         {"prompt": "a pear"}),
        (comfy(n6=node("CLIPTextEncodeSDXL", text_g="a pear", text_l="a pear", width=1024, clip=["4", 1])),
         {"prompt": "a pear"}),
        (comfy(n6=node("BNK_CLIPTextEncodeAdvanced", text="a pear", weight_interpretation="A1111", clip=["4", 1])),
         {"prompt": "a pear"}),
        (comfy(n6=node("CLIPTextEncode", text="a {red|blue} pear", clip=["4", 1])),
         {"prompt": "a {red|blue} pear", "dynamic_prompts": False}),
        (comfy(n6=node("CLIPTextEncode", text="x", clip=["10", 0]),
               n10=node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["4", 1])), {"prompt": "x", "clip_skip": 2}),
        (with_inputs(comfy(n10=node("Seed (rgthree)", seed=9)), "3", seed=["10", 0]), {"seed": 9}),
        (with_inputs(comfy(n10=node("RescaleCFG", model=["4", 0], multiplier=0.7)), "3", model=["10", 0]),
         {"guidance_rescale": 0.7}),
        (comfy(n3=node("SamplerCustom", **CUSTOM), n10=node("KSamplerSelect", sampler_name="heun"),
               n11=node("BasicScheduler", scheduler="simple", steps=12, denoise=1.0, model=["4", 0])),
         {"seed": 7, "guidance_scale": 5.0, "sampler": "heun", "spacing": "simple", "steps": 12}),
        (comfy(n3=node("SamplerCustom", **CUSTOM), n10=node("SamplerEulerAncestral", eta=0.5, s_noise=1.1),
               n11=node("KarrasScheduler", steps=12, sigma_max=14.6, sigma_min=0.03, rho=7.0)),
         {"seed": 7, "guidance_scale": 5.0, "spacing": "karras", "steps": 12, "eta": 0.5,
          "sampler_options": {"s_noise": 1.1}, "spacing_options": {"rho": 7.0, "sigma_min": 0.03, "sigma_max": 14.6}}),
        (comfy(n3=node("SamplerCustomAdvanced", noise=["12", 0], guider=["13", 0], sampler=["10", 0], sigmas=["11", 0],
                       latent_image=["5", 0]),
               n10=node("KSamplerSelect", sampler_name="euler"), n11=node("BasicScheduler", scheduler="beta", steps=9),
               n12=node("RandomNoise", noise_seed=3),
               n13=node("CFGGuider", model=["4", 0], positive=["6", 0], negative=["7", 0], cfg=2.5)),
         {"seed": 3, "guidance_scale": 2.5, "sampler": "euler", "spacing": "beta", "steps": 9}),
        (comfy(n3=node("SamplerCustomAdvanced", noise=["12", 0], guider=["13", 0], sampler=["10", 0], sigmas=["11", 0],
                       latent_image=["5", 0]),
               n10=node("KSamplerSelect", sampler_name="euler"), n11=node("BasicScheduler", scheduler="beta", steps=9),
               n12=node("RandomNoise", noise_seed=3), n13=node("BasicGuider", model=["4", 0], conditioning=["6", 0])),
         {"seed": 3, "guidance_scale": None, "negative_prompt": None, "sampler": "euler", "spacing": "beta",
          "steps": 9}),
        (comfy(n3=node("KSampler (Efficient)", **SAMPLER)), {}),
        (comfy(n3=node("KSamplerAdvanced", noise_seed=5, add_noise="enable", start_at_step=0, end_at_step=10000,
                       return_with_leftover_noise="disable",
                       **{k: v for k, v in SAMPLER.items() if k not in {"seed", "denoise"}})), {"seed": 5}),
    ],
)  # fmt: skip
def test_what_is_carried(graph: Json, changes: dict[str, Any]) -> None:
    assert difference(graph) == changes
    assert found(graph).notes == ()


LOADED = {"10": node("LoadImage", image="photo.png"), "11": node("VAEEncode", pixels=["10", 0], vae=["4", 2])}


@pytest.mark.parametrize(
    ("graph", "changes", "noted"),
    [
        (with_inputs(comfy() | LOADED, "3", latent_image=["11", 0], denoise=0.6),
         {"width": None, "height": None, "strength": 0.6}, [f"LoadImage: {NO_IMAGE}"]),
        (with_inputs(comfy() | LOADED | {"11": node("VAEEncodeForInpaint", pixels=["10", 0], mask=["10", 1])}, "3",
                     latent_image=["11", 0]),
         {"width": None, "height": None, "strength": 1.0},
         [f"LoadImage: {NO_IMAGE}",
          "VAEEncodeForInpaint: the mask itself is not in the metadata; give it with --mask"]),
        (with_inputs(comfy() | LOADED | {"12": node("KSamplerAdvanced", steps=20, start_at_step=15, end_at_step=20,
                                                    add_noise="enable", noise_seed=1, cfg=8.0, scheduler="normal",
                                                    sampler_name="euler_ancestral", model=["4", 0], positive=["6", 0],
                                                    negative=["7", 0], latent_image=["11", 0])}, "8",
                     samples=["12", 0]),
         {"width": None, "height": None, "seed": 1, "strength": 0.25}, [f"LoadImage: {NO_IMAGE}"]),
        (with_inputs(comfy(n10=node("LoraLoader", lora_name="a\\x.safetensors", strength_model=0.8, strength_clip=0.5,
                                    model=["4", 0]),
                           n11=node("LoraLoaderModelOnly", lora_name="../y.safetensors", strength_model=-1,
                                    model=["10", 0])), "3", model=["11", 0]),
         {"loras": ({"path": "x", "strength": 0.8, "text_strength": 0.5},
                    {"path": "y", "strength": -1.0, "text_strength": 0.0})}, []),
        (with_inputs(comfy(n10=node("Power Lora Loader (rgthree)", lora_1={"on": True, "lora": "x", "strength": 0.6},
                                    lora_2={"on": False, "lora": "y", "strength": 1}, model=["4", 0])), "3",
                     model=["10", 0]), {"loras": ({"path": "x", "strength": 0.6},)}, []),
        (with_inputs(comfy(n10=node("LoraStrange", name="x.safetensors", model=["4", 0])), "3", model=["10", 0]), {},
         ["LoraStrange: its file is not in the metadata; give it with --lora"]),
        (with_inputs(comfy(n10=node("FreeU", b1=1.1, model=["4", 0])), "3", model=["10", 0]), {},
         ["FreeU: changes of the model are not read"]),
        (with_inputs(comfy(n10=node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0])), "3",
                     positive=["10", 0], negative=["10", 1]), {},
         ["ControlNetApplyAdvanced: conditionings are not combined or controlled"]),
        (with_inputs(comfy(n10=node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["7", 0])), "3",
                     positive=["10", 0]), {}, ["ConditioningCombine: conditionings are not combined or controlled"]),
        (with_inputs(comfy(n10=node("ConditioningZeroOut", conditioning=["6", 0])), "3", negative=["10", 0]),
         {"negative_prompt": ""},
         ["ConditioningZeroOut: a conditioning of zeros is not the empty prompt, which is drawn with"]),
        (comfy(n6=node("CLIPTextEncodeSDXL", text_g="a pear", text_l="fruit", clip=["4", 1])), {"prompt": "a pear"},
         ["CLIPTextEncodeSDXL: one prompt goes to both text encoders"]),
        (comfy(n6=node("Mystery", clip=["4", 1])), {"prompt": ""},
         ["Mystery: conditionings are not combined or controlled",
          "KSampler: its prompt comes from nodes that are not known"]),
        (with_inputs(comfy(), "5", batch_size=4), {"count": 4, "only": 0},
         ["batch_size: which of the batch it is cannot be told; the first is drawn"]),
        (with_inputs(comfy(), "3", denoise=0.5), {},
         ["denoise: on an empty latent it would leave noise out; 1 is drawn"]),
        (with_inputs(comfy(), "3", sampler_name="magic", scheduler="odd"), {"sampler": None, "spacing": None},
         ["KSampler: there is no such sampler here; the model's own is used",
          "KSampler: there is no such spacing here; the model's own is used"]),
        (with_inputs(comfy(n10=node("ImageUpscaleWithModel", image=["8", 0])), "9", images=["10", 0]), {},
         ["ImageUpscaleWithModel: what is done to the finished picture is not read"]),
        (comfy(n3=node("SamplerCustom", **CUSTOM), n10=node("KSamplerSelect", sampler_name="euler_ancestral"),
               n11=node("SplitSigmas", step=5, sigmas=["12", 0]),
               n12=node("BasicScheduler", scheduler="normal", steps=20)),
         {"seed": 7, "guidance_scale": 5.0}, ["SplitSigmas: sigmas made by hand are not read"]),
        (with_inputs(comfy(), "3", seed=2**64 - 1), {"seed": None},
         ["seed: input should be less than or equal to 9223372036854775807"]),
    ],
)  # fmt: skip
def test_what_is_noted(graph: Json, changes: dict[str, Any], noted: list[str]) -> None:
    assert difference(graph) == changes
    assert reasons(graph) == noted


def second(**changes: Any) -> Json:
    """The inputs of a second pass."""
    return {**SAMPLER, "latent_image": ["10", 0], "denoise": 0.5} | changes


def hires(between: Json, **changes: Any) -> Json:
    """The example with a second pass after the nodes `between`, the last of which is 10."""
    return with_inputs(comfy() | between | {"20": node("KSampler", **second(**changes))}, "8", samples=["20", 0])


BY = {"10": node("LatentUpscaleBy", samples=["3", 0], upscale_method="nearest-exact", scale_by=1.5)}
DECODED = {
    "11": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
    "10": node("VAEEncode", pixels=["12", 0], vae=["4", 2]),
}


@pytest.mark.parametrize(
    ("graph", "expected", "noted"),
    [
        (hires(BY), {"strength": 0.5, "scale": 1.5, "upscaler": "latent_nearest_exact"}, []),
        (hires(BY, steps=7, cfg=3.0, sampler_name="euler", scheduler="karras", positive=["7", 0]),
         {"strength": 0.5, "scale": 1.5, "upscaler": "latent_nearest_exact", "steps": 7, "guidance_scale": 3.0,
          "sampler": "euler", "spacing": "karras", "prompt": "watermark"}, []),
        (hires({"10": node("LatentUpscale", samples=["3", 0], upscale_method="bilinear", width=1024, height=0)}),
         {"strength": 0.5, "width": 1024, "upscaler": "latent"}, []),
        (hires({"10": node("LatentUpscaleBy", samples=["3", 0], upscale_method="bislerp", scale_by=2.0)}),
         {"strength": 0.5, "scale": 2.0, "upscaler": "latent"}, ["LatentUpscaleBy: enlarged by latent instead"]),
        (hires(BY, seed=9), {"strength": 0.5, "scale": 1.5, "upscaler": "latent_nearest_exact"},
         ["KSampler: the hires fix has the first seed"]),
        (hires(DECODED | {"12": node("ImageScaleBy", image=["11", 0], upscale_method="lanczos", scale_by=2)}),
         {"strength": 0.5, "scale": 2.0, "upscaler": "lanczos"}, []),
        (hires(DECODED | {"13": node("ImageUpscaleWithModel", image=["11", 0], upscale_model=["14", 0]),
                          "14": node("UpscaleModelLoader", model_name="4x-UltraSharp.pth"),
                          "12": node("ImageScaleBy", image=["13", 0], upscale_method="area", scale_by=0.5)}),
         {"strength": 0.5, "scale": 2.0, "upscaler": "lanczos"},
         ["ImageUpscaleWithModel: give the upscaler's file with --hires-upscaler",
          "ImageScaleBy: enlarged by lanczos instead"]),
    ],
)  # fmt: skip
def test_a_second_pass_is_a_hires_fix(graph: Json, expected: dict[str, Any], noted: list[str]) -> None:
    assert difference(graph) == {"hires": expected}
    assert reasons(graph) == noted


def test_a_third_pass_is_noted() -> None:
    graph = hires(BY)
    again = {"21": node("LatentUpscaleBy", samples=["20", 0], upscale_method="bilinear", scale_by=2.0),
             "22": node("KSampler", **second(latent_image=["21", 0]))}  # fmt: skip
    graph = with_inputs(graph | again, "8", samples=["22", 0])
    assert difference(graph)["hires"]["scale"] == 1.5
    assert reasons(graph) == ["KSampler: only a first pass and a hires fix are drawn"]


def handed_over(**settings: Any) -> dict[str, Any]:
    """A graph whose second sampler goes on with another model."""
    base = node("KSamplerAdvanced", **SAMPLER, noise_seed=3, start_at_step=0, end_at_step=15, add_noise="enable",
                return_with_leftover_noise="enable")  # fmt: skip
    refiner = node("KSamplerAdvanced", **(SAMPLER | {"latent_image": ["3", 0]}), noise_seed=3, start_at_step=15,
                   end_at_step=20, add_noise="disable", return_with_leftover_noise="disable")  # fmt: skip
    other = node("CheckpointLoaderSimple", ckpt_name="refiner.safetensors")
    graph = with_inputs(comfy(n3=base, n20=refiner, n21=other), "8", samples=["20", 0])
    return with_inputs(graph, "20", **settings)


def test_a_refiner() -> None:
    graph = handed_over(model=["21", 0])
    assert difference(graph) == {"refine": {"model": "refiner.safetensors", "at": 0.75}}
    assert reasons(graph) == []
    assert found(graph).model == {"name": "v1-5.safetensors"}


@pytest.mark.parametrize("settings", [{}, {"model": ["21", 0], "sampler_name": "ddim"}])
def test_a_run_that_goes_on_in_another_way_is_noted(settings: dict[str, Any]) -> None:
    """With the same model, or with another sampler."""
    graph = handed_over(**settings)
    assert difference(graph) == {}
    assert reasons(graph) == ["KSamplerAdvanced: only a first pass and a hires fix are drawn"]


def test_several_pictures_are_saved() -> None:
    graph = comfy(n20=node("KSampler", **(SAMPLER | {"seed": 2})), n21=node("VAEDecode", samples=["20", 0]),
                  n22=node("SaveImage", images=["21", 0]))  # fmt: skip
    assert difference(graph) == {}
    assert reasons(graph) == ["SaveImage: the graph saves several pictures; the first is read"]


@pytest.mark.parametrize("kind", ["PreviewImage", "Image Save", "Nothing"])
def test_whatever_saves_the_picture(kind: str) -> None:
    assert difference(comfy(n9=node(kind, images=["8", 0]))) == {}


def test_no_sampler() -> None:
    with pytest.raises(RequestError, match="no sampler that is known; its nodes are LoadImage, SaveImage"):
        found({"1": node("LoadImage", image="a.png"), "2": node("SaveImage", images=["1", 0])})


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_what_is_no_graph(text: str) -> None:
    with pytest.raises(RequestError, match="ComfyUI's prompt is"):
        read(text)


def chain(n: int, make: Any) -> Json:
    return {str(i): make(i) for i in range(n)}


def ring(i: int, n: int = 4990) -> Json:
    links = {
        name: [str((i + step) % n), 0] for step, name in enumerate(("latent_image", "model", "positive", "seed"), 1)
    }
    return node("KSampler", sampler_name="euler", steps=1, cfg=1, **links)


HOSTILE = {
    "a ring of samplers": chain(4990, ring),
    "a long way": comfy(n8=node("Reroute", a=["30", 0])) | {
        str(i): node("Reroute", a=[str(i + 1), 0], width=[str(i + 1), 0]) for i in range(30, 4900)},
    "many outputs": comfy() | {str(i): node("SaveImage", images=[str(i + 1), 0]) for i in range(30, 4900)},
    "huge numbers": comfy(n3=node("KSamplerAdvanced", sampler_name="euler", steps=10**4000, cfg=1e308, seed=-(10**4000),
                                  start_at_step=-(10**4000), end_at_step=10**4000, latent_image=["5", 0]),
                          n5=node("EmptyLatentImage", width=10**4000, height=10**9, batch_size=10**4000)),
    "values of any kind": comfy(n3=node("KSampler", **({name: {"a": [1]} for name in SAMPLER} | {"cfg": True}))),
    "megabytes": comfy(n6=node("CLIPTextEncode", text="a" * 3_000_000), n7=node("CLIPTextEncode", text="\ud800" * 9)),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_graphs_end_soon(kind: str) -> None:
    text = text_of(HOSTILE[kind])
    started = time.process_time()
    try:
        notes = read(text).notes
    except RequestError as error:
        notes = (str(error),)
    assert time.process_time() - started < 2
    assert len(notes) <= 101
    assert all("\n" not in note and len(note) < 400 for note in notes)


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
links = st.tuples(st.sampled_from("3456789"), st.integers(0, 2)).map(list)
kinds = st.sampled_from(["KSampler", "SamplerCustom", "KSamplerAdvanced", "CLIPTextEncode", "VAEEncode",
                         "LatentUpscaleBy", "LoadImage", "KarrasScheduler", "ConditioningZeroOut", "Reroute",
                         "LoraLoader", "ImageScale"])  # fmt: skip
names = st.sampled_from([*SAMPLER, "text", "clip", "samples", "pixels", "sigmas", "sampler", "noise", "guider", "width",
                         "height", "scale_by", "upscale_method", "ckpt_name", "eta", "stop_at_clip_layer"])  # fmt: skip
nodes = st.builds(lambda kind, inputs: node(kind, **inputs), kinds, st.dictionaries(names, values | links, max_size=10))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from("3456789"), nodes, max_size=6))
def test_any_graph_is_read_or_refused(changes: dict[str, Json]) -> None:
    try:
        one = found(comfy() | changes)
    except RequestError as error:
        assert "\n" not in str(error)
    else:
        assert one.request.preset == "comfy"
