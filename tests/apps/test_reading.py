"""What `reverie read` prints, and what `--from` draws."""

import inspect
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given, settings
from typer.testing import CliRunner

import reverie
from reverie.apps import flags, reading
from reverie.engine.image import save_image, to_images
from reverie.engine.metadata import own
from reverie.engine.metadata.read import read_metadata
from reverie.engine.metadata.report import Found
from reverie.engine.request import Request
from reverie.errors import RequestError
from tests.engine.metadata import samples

MODEL = {"name": "tiny", "source": "/models/my tiny.safetensors", "family": "sd1", "hash": "ab" * 32}
REQUEST = Request.of(
    prompt="it's a \"red\" apple\non a table", negative_prompt="-rain", steps=2, sampler="ddim", spacing="leading",
    seed=7, guidance_scale=3.5, width=16, height=8, rng="cpu", keep_unmasked=False,
    hires={"scale": 1.5, "upscaler": "x y"}, tiles={},
    guides=["pag:scale=3,layers=mid", "sag"], sampler_options={"a": 1, "b": True}, sigmas=(3, 1.5, 0),
)  # fmt: skip


def picture(path: Path, request: Request = REQUEST, model: dict[str, str] | None = None) -> Path:
    """A picture that was drawn so."""
    save_image(to_images(torch.zeros(1, 8, 16, 3), [request], model or MODEL)[0], path)
    return path


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return picture(tmp_path / "ours.png")


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return samples.png(tmp_path / "theirs.png", {"parameters": samples.A1111})


def printed(path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    capsys.readouterr()
    reading.run_read(path, form)
    return capsys.readouterr()


def test_the_report(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = printed(theirs, "report", capsys)
    assert out.splitlines() == [
        "made by               AUTOMATIC1111 v1.10.1",
        "model                 dreamshaper_8  abc123def0",
        "prompt                a castle on a hill, <lora:castle:0.8>",
        "                      at dusk",
        "negative prompt       blurry",
        "                      ugly",
        "clip skip             2",
        "width                 512",
        "height                768",
        "seed                  12345",
        "rng                   philox",
        "preset                a1111",
        "steps                 20",
        "sampler               euler_a",
        "spacing               karras",
        "guidance scale        6.5",
        "not carried           Adapter: <lora:castle:0.8> "
        "(it stays in the prompt; its file is looked for by that name)",
    ]
    assert err == ""


def test_groups_in_the_report(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(ours, "report", capsys)[0].splitlines()
    assert f"made by               Reverie {reverie.__version__}" in lines
    assert "hires                 scale 1.5, upscaler x y" in lines
    assert "guides                name pag, options scale 3, layers mid; name sag" in lines
    assert "tiles                 yes" in lines


def test_a_terminal_obeys_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = picture(tmp_path / "a.png", REQUEST.model_copy(update={"prompt": "\x1b[2J\u202eevil\ud800\x07"}))
    for form in reading.WRITERS:
        out, err = printed(path, form, capsys)
        assert not reading.UNPRINTABLE.search(out + err)
        assert "evil" in out


def test_json(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(ours, "json", capsys)
    assert Request.of(**json.loads(out)) == REQUEST


def test_python(ours: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippet runs, and asks for the same."""
    asked: dict[str, Any] = {}

    class Model:
        def __init__(self, *source: str) -> None:
            asked["model"] = source

        def generate(self, **fields: Any) -> Any:
            asked["request"] = Request.of(**fields)
            return type("Result", (), {"images": [type("Image", (), {"save": lambda _, path: None})()]})

    monkeypatch.setattr(reverie, "load", Model, raising=False)
    exec(printed(ours, "python", capsys)[0], {})
    assert asked == {"model": (MODEL["source"],), "request": REQUEST}


def test_the_text_of_a1111(ours: Path, theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(theirs, "a1111", capsys)[0] == samples.A1111 + "\n"
    text = printed(ours, "a1111", capsys)[0]
    assert text.endswith(f", Version: Reverie {reverie.__version__}\n")
    assert "Sampler: DDIM, " in text


def test_what_is_not_carried_goes_to_stderr(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form in ("cli", "python", "json", "a1111"):
        out, err = printed(theirs, form, capsys)
        assert err.startswith("not carried: Adapter: <lora:castle:0.8> ")
        assert "not carried" not in out


def parsed(line: str) -> tuple[dict[str, Any], str | None]:
    """The fields and the model that a printed command line asks for, by the flags of the command line itself."""
    found: dict[str, Any] = {}

    def generate(prompt: str = typer.Argument(""), model: str = typer.Option(None), **values: Any) -> None:
        found["model"] = model
        found["fields"] = flags.fields(values) | ({"prompt": prompt} if prompt else {})

    known = [p for p in inspect.signature(generate).parameters.values() if p.name != "values"]
    generate.__signature__ = inspect.Signature([*known, *flags.parameters()])  # type: ignore[attr-defined]
    app = typer.Typer()
    app.command()(generate)
    program, verb, *words = shlex.split(line)
    assert (program, verb) == ("reverie", "generate")
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    return found["fields"], found["model"]


def test_the_command_line(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields, model = parsed(printed(ours, "cli", capsys)[0])
    assert Request.of(**fields) == REQUEST
    assert model == MODEL["source"]


@settings(max_examples=15, deadline=None)
@given(samples.requests(**samples.own_fields))
def test_any_request_as_a_command_line(request: Request) -> None:
    line = reading.command_line(Found("Reverie", request, {"source": "bundled"}, (), ""))
    fields, model = parsed(line)
    assert Request.of(**fields) == request
    assert model is None


def test_a_prompt_that_looks_like_a_flag() -> None:
    line = reading.command_line(Found("Reverie", Request(prompt="--steps"), {}, (), ""))
    assert line == "reverie generate -- --steps"
    assert parsed(line) == ({"prompt": "--steps"}, None)


def test_unknown_forms(ours: Path) -> None:
    with pytest.raises(RequestError, match="unknown form 'xml'; known: report, cli, python, json, a1111"):
        reading.run_read(ours, "xml")


# --from


def test_drawn_again_with_changes(ours: Path) -> None:
    request, found = reading.redraw(ours, {"seed": 9, "hires": {"strength": 0.3}, "extend": {"left": 8}})
    assert request == Request.of(**REQUEST.model_dump() | {
        "seed": 9, "hires": {"scale": 1.5, "upscaler": "x y", "strength": 0.3}, "extend": {"left": 8}})  # fmt: skip
    assert (found.own, found.model, found.notes) == (True, MODEL, ())


def test_pictures_of_others_can_be_drawn_too(theirs: Path) -> None:
    request, found = reading.redraw(theirs, {"prompt": "a pear"})
    assert (request.prompt, request.seed, request.preset) == ("a pear", 12345, "a1111")
    assert not found.own
    assert found.notes[0].startswith("Adapter: ")


def test_changes_that_cannot_be(ours: Path) -> None:
    with pytest.raises(RequestError, match="steps is 0"):
        reading.redraw(ours, {"steps": 0})


def test_the_picture_it_began_with_is_not_in_it(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", REQUEST.model_copy(update={"image": "data:image/png;base64,AAAA"}))
    with pytest.raises(RequestError, match="does not hold the picture it was drawn from; give it with --image"):
        reading.redraw(path, {})
    request, found = reading.redraw(path, {"image": "photo.png"})
    assert request.image == "photo.png"
    assert found.notes == ()


def test_the_picture_it_began_with_has_changed(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"photo")
    path = picture(tmp_path / "a.png", REQUEST.model_copy(update={"image": str(photo)}))
    assert reading.redraw(path, {})[1].notes == ()
    photo.write_bytes(b"another photo")
    (note,) = reading.redraw(path, {})[1].notes
    assert note.startswith(f"image: {photo} (it has changed since; its SHA-256 was ")
    assert own.pictures(read_metadata(path))["image"] in note
    assert reading.redraw(path, {"image": "other.png"})[1].notes == ()
    photo.unlink()
    assert reading.redraw(path, {})[1].notes == ()


def test_adapters_as_they_are_written() -> None:
    """What the command line prints of adapters is read as the same fields."""
    request = Request.of(
        prompt="a cat", guides="pag:scale=3", embeddings="word=file.pt",
        loras=["a/b.safetensors:0.8:start=0.2,blocks.down.1=0.5", {"path": "c", "text_strength": -0.5}],
        controls=["canny:pic.png:1.0:0:0.8:net=x.pth,options.low=100,blocks=1+0.5", "pose:q.png"],
        image_prompts="p.png|q.png:0.6:adapter=ip.bin",
    )  # fmt: skip
    words = shlex.split(reading.command_line(Found("", request, {}, (), "")))[2:-1]
    flags: dict[str, list[str]] = {}
    for name, value in zip(words[::2], words[1::2], strict=True):
        flags.setdefault(f"{name.removeprefix('--').replace('-', '_')}s", []).append(value)
    assert Request.of(prompt="a cat", **flags) == request
