"""Which program's metadata a picture carries."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reverie.engine.metadata import containers, own
from reverie.engine.metadata.read import read_metadata, read_text, read_texts
from reverie.engine.request import Request
from reverie.errors import RequestError
from tests.engine.metadata import samples
from tests.engine.metadata.test_programs import DRAW_THINGS, DREAM, EASY, FOOOCUS, INVOKE, INVOKE_2, NOVELAI, SWARM, xmp
from tests.engine.metadata.test_stealth import hide

OWN = own.write(Request(prompt="a cat", seed=7), {"name": "tiny"}, {})
GRAPH = samples.text_of(samples.comfy())
CHUNKS: dict[str, tuple[dict[str, str], str]] = {
    "own": ({"reverie": OWN, "parameters": samples.A1111}, "Reverie"),
    "a1111": ({"parameters": samples.A1111}, "AUTOMATIC1111 v1.10.1"),
    "comfy": ({"prompt": GRAPH, "workflow": "{}"}, "ComfyUI"),
    "comfy and text": ({"prompt": GRAPH, "parameters": samples.A1111}, "ComfyUI"),
    "a graph that cannot be read, and text": ({"prompt": "{}", "parameters": samples.A1111}, "AUTOMATIC1111 v1.10.1"),
    "invoke": ({"invokeai_metadata": json.dumps(INVOKE), "invokeai_graph": "{}"}, "InvokeAI 4.2.0"),
    "invoke 2": ({"sd-metadata": json.dumps(INVOKE_2), "Dream": DREAM}, "InvokeAI 2.3.0"),
    "invoke 1": ({"Dream": DREAM}, "InvokeAI"),
    "novelai": (NOVELAI, "NovelAI"),
    "fooocus": ({"parameters": json.dumps(FOOOCUS), "fooocus_scheme": "fooocus"}, "Fooocus v2.5.0"),
    "fooocus in a comment": ({"Comment": json.dumps(FOOOCUS)}, "Fooocus v2.5.0"),
    "swarm": ({"parameters": json.dumps(SWARM, indent=2)}, "SwarmUI 0.9.3.1"),
    "draw things": ({"XML:com.adobe.xmp": xmp(DRAW_THINGS)}, "Draw Things"),
    "easy diffusion": (EASY, "Easy Diffusion"),
}


@pytest.mark.parametrize("kind", CHUNKS)
def test_chunks_of_a_png(kind: str, tmp_path: Path) -> None:
    chunks, program = CHUNKS[kind]
    found = read_metadata(samples.png(tmp_path / "a.png", chunks))
    assert found.program.startswith(program)
    assert found.own == (kind == "own")


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (samples.A1111, "AUTOMATIC1111 v1.10.1"), (GRAPH, "ComfyUI"), (json.dumps(INVOKE), "InvokeAI 4.2.0"),
        (json.dumps(NOVELAI), "NovelAI"), (NOVELAI["Comment"], "NovelAI"), (json.dumps(FOOOCUS), "Fooocus v2.5.0"),
        (json.dumps(SWARM), "SwarmUI 0.9.3.1"), (json.dumps(EASY), "Easy Diffusion"), (OWN, "Reverie"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "stealth", "text"])
def test_the_same_text_in_other_places(text: str, program: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    if kind == "text":
        assert read_text(text).program.startswith(program)
        return
    if kind == "stealth":
        hide(text.encode(), "pngcomp", (256, 256)).save(path, "PNG")
    else:
        Image.new("RGB", (16, 16)).save(path, kind, **containers.save_parameters(kind, {"parameters": text}))
    assert read_metadata(path).program.startswith(program)


def test_novelai_may_leave_the_size_to_the_picture(tmp_path: Path) -> None:
    comment = json.dumps(
        {"uc": "", "steps": 28, "sampler": "k_euler", "seed": 1, "scale": 11, "noise": 0.2, "strength": 0.7}
    )
    chunks = {"Software": "NovelAI", "Description": "1girl", "Comment": comment}
    request = read_metadata(samples.png(tmp_path / "a.png", chunks)).request
    assert (request.width, request.height, request.seed) == (16, 16, 1)


def test_a_gif(tmp_path: Path) -> None:
    Image.new("P", (8, 8)).save(tmp_path / "a.gif", comment=samples.A1111.encode())
    assert read_metadata(tmp_path / "a.gif").request.seed == 12345


def test_words_without_settings_are_no_metadata(tmp_path: Path) -> None:
    path = samples.png(tmp_path / "a.png", {"parameters": "just words", "Comment": "Created with GIMP"})
    with pytest.raises(RequestError, match="does not carry a request of Reverie, nor the metadata of another program"):
        read_metadata(path)
    assert read_text("just words").request.prompt == "just words"


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ({}, "it has no text"), ({"Title": "x", "Author": "y"}, "its texts are Author, Title"),
        ({"workflow": "{}"}, "it has only ComfyUI's `workflow`"),
        ({"prompt": "not JSON"}, "ComfyUI's prompt is not JSON"),
        ({"reverie": "{"}, "does not carry a request of Reverie that can be read"),
    ],
)  # fmt: skip
def test_one_line_says_what_there_is(chunks: dict[str, str], said: str, tmp_path: Path) -> None:
    path = samples.png(tmp_path / "a.png", chunks)
    with pytest.raises(RequestError) as caught:
        read_metadata(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert said in line
    assert "\n" not in line


BIG = containers.MOST_TEXT - 1000


@pytest.mark.parametrize(
    "text",
    [
        "x" * (containers.MOST_TEXT + 1), "{" * BIG, '{"a":' * (BIG // 5), "[" * BIG,
        '{"a": [' + "1," * (BIG // 2) + "1]}", '{"a": ' + "9" * BIG + "}",
        '{"sui_image_params": {' + ",".join(f'"k{i}": {i}' for i in range(BIG // 20)) + "}}",
        "Steps: 1, " * (BIG // 10), '{"prompt": "' + "a" * BIG + '", "full_prompt": []}',
    ],
    ids=range(9),
)  # fmt: skip
def test_megabytes_end_soon(text: str) -> None:
    started = time.process_time()
    try:
        assert len(read_text(text).notes) <= 101
    except RequestError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 500
    assert time.process_time() - started < 2


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["prompt", "request", "model", "uc", "scale", "positive_prompt", "full_prompt", "Comment",
                         "sui_image_params", "class_type", "inputs", "use_stable_diffusion_model", "Software"])
        | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
).map(json.dumps)  # fmt: skip
keywords = st.sampled_from(["parameters", "prompt", "workflow", "reverie", "invokeai_metadata", "sd-metadata", "Dream",
                            "Software", "Comment", "Description", "xmp", "stealth", "comment", "Title"])  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(keywords, anything | st.text(max_size=40) | st.just("NovelAI"), max_size=4))
def test_any_texts_are_read_or_refused(texts: dict[str, str]) -> None:
    try:
        found = read_texts(texts)
    except RequestError as error:
        assert "\n" not in str(error)
    else:
        assert all("\n" not in note for note in found.notes)
