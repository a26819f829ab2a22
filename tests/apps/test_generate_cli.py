"""`reverie generate`: where pictures go, what they carry, and drawing them again."""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import reverie
from reverie.engine.image import Picture
from tests.apps.commandline import CommandLine, Ran

Pixels = NDArray[np.uint8]
PROMPT = 'a red apple, ripe: a "very" long\nstory'
ENTRY = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # how A1111's readers find an entry


def pixels(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def text(path: Path, key: str) -> str:
    with Image.open(path) as image:
        return str(image.info[key])


def parse_parameters(parameters: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and entries, by the rules of AUTOMATIC1111's web UI."""
    *lines, last = parameters.strip().split("\n")
    entries = {key: json.loads(v) if v.startswith('"') else v for key, v in ENTRY.findall(last)}
    assert len(entries) >= 3
    at = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[at:]).removeprefix("Negative prompt:").strip()
    return "\n".join(lines[:at]), negative, entries


def last_event(ran: Ran) -> dict[str, Any]:
    """What `--json` says at the end."""
    event: dict[str, Any] = json.loads(ran.out.splitlines()[-1])
    assert event["event"] == "done"
    return event


@pytest.fixture
def picture(cli: CommandLine, folder: Path, tmp_path: Path) -> Path:
    """One picture, drawn with everything at its default."""
    path = tmp_path / "picture.png"
    assert cli("generate", "a red apple", "--model", folder, "--seed", 7, "--out", path).code == 0
    return path


def test_one_picture(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "apple.png"
    ran = cli("generate", "a red apple", "--model", folder, "--seed", 7, "--out", out)
    assert ran.code == 0
    assert ran.out == f"{out}  32x32, seed 7\n"
    assert pixels(out).shape == (32, 32, 3)
    assert [p.name for p in out.parent.iterdir()] == ["apple.png"]


@pytest.mark.parametrize("ending", ["jpg", "webp", "PNG", "bmp"])
def test_the_ending_decides_the_format(cli: CommandLine, folder: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"apple.{ending}"
    assert cli("generate", "apple", "--model", folder, "--out", out).code == 0
    with Image.open(out) as image:
        assert image.format == {"jpg": "JPEG"}.get(ending, ending.upper())
        assert image.size == (32, 32)


def test_several_go_into_a_folder_and_overwrite_nothing(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "drawn"
    out.mkdir()
    (out / "00041.png").write_bytes(b"mine")
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    (out / "1²3.png").write_bytes(b"no number")
    for _ in range(2):
        assert cli("generate", "apple", "--model", folder, "--seed", 1, "--count", 2, "--out", out).code == 0
    names = {"00041.png", "00042.png", "00043.png", "00044.png", "00045.png", "notes.txt", "1²3.png"}
    assert {p.name for p in out.iterdir()} == names
    assert (out / "00041.png").read_bytes() == b"mine"
    assert np.array_equal(pixels(out / "00042.png"), pixels(out / "00044.png"))
    assert not np.array_equal(pixels(out / "00042.png"), pixels(out / "00043.png"))


def test_a_folder_is_made(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    assert cli("generate", "apple", "--model", folder, "--out", tmp_path / "drawn").code == 0
    assert [p.name for p in (tmp_path / "drawn").iterdir()] == ["00001.png"]


def test_several_with_a_name_are_numbered(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    assert cli("generate", "apple", "--model", folder, "--count", 3, "--out", tmp_path / "a.b.png").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.b-1.png", "a.b-2.png", "a.b-3.png"]


def test_json(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    ran = cli("generate", "apple", "--model", folder, "--count", 2, "--seed", 5, "--out", out, "--json")
    report = last_event(ran)
    assert report["files"] == [str(tmp_path / "a-1.png"), str(tmp_path / "a-2.png")]
    assert all(Path(file).is_file() for file in report["files"])
    assert report["seconds"] > 0
    assert report["model"]["name"] == "tiny"
    assert re.fullmatch("[0-9a-f]{64}", report["model"]["hash"])
    asked = {"prompt": "apple", "seed": 5, "count": 2, "steps": 2, "sampler": "ddim", "spacing": "leading"}
    assert asked.items() <= report["request"].items()


def test_flags_are_the_fields(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "negative_prompt": "rain", "width": 48, "height": 16, "steps": 3, "guidance_scale": 2.5, "seed": 11,
        "count": 1, "batch_size": 2, "sampler": "Euler a", "spacing": "karras", "eta": 0.5, "clip_skip": 2,
        "upscaler": "none", "dialect": "plain", "guidance_rescale": 0.2, "guidance_end": 0.9, "rng": "philox",
        "eta_noise_delta": 3, "variation_seed": 5, "variation_strength": 0.1, "guidance_curve": "linear",
    }  # fmt: skip
    assert given.keys() < reverie.Request.model_fields.keys()
    flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    ran = cli("generate", "apple", *flags, "--model", folder, "--out", tmp_path / "a.png", "--json")
    asked = given | {"prompt": "apple", "sampler": "euler_a"}
    assert asked.items() <= last_event(ran)["request"].items()
    assert pixels(tmp_path / "a.png").shape == (16, 48, 3)
    direct = reverie.load(folder).generate("apple", **given)
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(direct.images[0]))


def test_a_picture_carries_the_parameters_of_a1111(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    ran = cli(
        "generate", PROMPT, "--negative-prompt", "blurry\ndark", "--model", folder, "--seed", 3, "--count", 2,
        "--sampler", "dpm++ 2m", "--spacing", "karras", "--clip-skip", 2, "--out", out, "--json",
    )  # fmt: skip
    sha = last_event(ran)["model"]["hash"]
    prompt, negative, entries = parse_parameters(text(tmp_path / "a-2.png", "parameters"))
    assert (prompt, negative) == (PROMPT, "blurry\ndark")
    assert list(entries.items()) == [
        ("Steps", "2"), ("Sampler", "DPM++ 2M"), ("Schedule type", "Karras"), ("CFG scale", "3"), ("Seed", "4"),
        ("Size", "32x32"), ("Model hash", sha[:10]), ("Model", "tiny"), ("Clip skip", "2"), ("RNG", "CPU"),
        ("Version", f"Reverie {reverie.__version__}"),
    ]  # fmt: skip


def test_an_empty_negative_prompt_has_no_line(picture: Path) -> None:
    assert text(picture, "parameters").startswith("a red apple\nSteps: 2, Sampler: DDIM, ")


def test_values_with_commas_are_quoted(folder: Path, tmp_path: Path, cli: CommandLine) -> None:
    odd = tmp_path / "a, b: c"
    shutil.copytree(folder, odd)
    assert cli("generate", "apple", "--model", odd, "--out", tmp_path / "a.png").code == 0
    assert ', Model: "a, b: c", ' in text(tmp_path / "a.png", "parameters")
    assert parse_parameters(text(tmp_path / "a.png", "parameters"))[2]["Model"] == "a, b: c"


def test_a_picture_carries_its_request(picture: Path, folder: Path) -> None:
    carried = json.loads(text(picture, "reverie"))
    assert carried["version"] == reverie.__version__
    assert carried["model"]["source"] == str(folder)
    request = reverie.Request.of(**carried["request"])
    assert (request.prompt, request.seed, request.steps, request.width) == ("a red apple", 7, 2, 32)


def test_letters_outside_latin_1_survive(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    prompt = "ein Apfel 🍎, りんご"
    assert cli("generate", prompt, "--model", folder, "--out", tmp_path / "a.png").code == 0
    assert json.loads(text(tmp_path / "a.png", "reverie"))["request"]["prompt"] == prompt
    assert parse_parameters(text(tmp_path / "a.png", "parameters"))[0] == prompt


def test_drawn_again_it_is_the_same_to_the_bit(cli: CommandLine, picture: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.png"
    ran = cli("generate", "--from", picture, "--out", again)
    assert ran.code == 0, ran.err
    assert again.read_bytes() == picture.read_bytes()


def test_the_third_of_four_is_drawn_again(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    flags = ["--sampler", "euler_a", "--count", 4, "--out", tmp_path / "a.png"]
    assert cli("generate", "apple", "--model", folder, *flags).code == 0
    assert cli("generate", "--from", tmp_path / "a-3.png", "--out", tmp_path / "again.png").code == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "a-3.png").read_bytes()
    assert not np.array_equal(pixels(tmp_path / "a-3.png"), pixels(tmp_path / "a-2.png"))


def test_a_changed_refiner_does_not_finish(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    other, picture, again = tmp_path / "other", tmp_path / "a.png", tmp_path / "b.png"
    shutil.copytree(folder, other)
    assert cli("generate", "apple", "--model", folder, "--refine-model", other, "--out", picture).code == 0
    assert cli("generate", "--from", picture, "--out", again).code == 0
    assert again.read_bytes() == picture.read_bytes()
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    line = cli.refused("generate", "--from", picture, "--out", again)
    assert "finished by another" in line and "--refine-model" in line
    assert cli("generate", "--from", picture, "--refine-model", folder, "--out", again).code == 0


def test_flags_override_the_picture(cli: CommandLine, picture: Path, folder: Path, tmp_path: Path) -> None:
    flags = ["--steps", 4, "--out", tmp_path / "b.png", "--json"]
    old = json.loads(text(picture, "reverie"))["request"]
    again = last_event(cli("generate", "--from", picture, *flags))["request"]
    assert {k: v for k, v in (old | {"steps": 4}).items() if v is not None} == again
    assert last_event(cli("generate", "a pear", "--from", picture, *flags))["request"]["prompt"] == "a pear"
    expected = reverie.load(folder).generate("a pear", seed=7, steps=4).images[0]
    assert np.array_equal(pixels(tmp_path / "b.png"), np.asarray(expected))


def test_a_changed_model_is_not_drawn_with(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    picture = tmp_path / "a.png"
    assert cli("generate", "apple", "--model", mine, "--out", picture).code == 0
    weights = mine / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    said = cli.refused("generate", "--from", picture, "--out", tmp_path / "b.png")
    assert "another mine" in said
    assert "hash differs" in said
    assert "--model" in said
    assert not (tmp_path / "b.png").exists()
    assert cli("generate", "--from", picture, "--model", mine, "--out", tmp_path / "b.png").code == 0


def test_a_single_file_draws(cli: CommandLine, single: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    size = ["--width", 32, "--height", 32, "--steps", 2, "--seed", 1]
    ran = cli("generate", "apple", "--model", single, *size, "--out", out)
    assert ran.code == 0, ran.err
    assert cli("generate", "--from", out, "--out", tmp_path / "b.png").code == 0
    assert (tmp_path / "b.png").read_bytes() == out.read_bytes()


@pytest.fixture(scope="module")
def drawn(folder: Path) -> Picture:
    image = reverie.load(folder).generate("apple", seed=1).images[0]
    assert isinstance(image, Picture)
    return image


def test_saved_by_hand_it_carries_its_request_too(drawn: Picture, cli: CommandLine, tmp_path: Path) -> None:
    drawn.save(tmp_path / "x.png")
    drawn.save(str(tmp_path / "y.png"))
    with (tmp_path / "z.png").open("wb") as file:
        drawn.save(file, "PNG")
    for name in "xyz":
        assert text(tmp_path / f"{name}.png", "reverie") == drawn.info["reverie"]
        assert parse_parameters(text(tmp_path / f"{name}.png", "parameters"))[0] == "apple"
    assert cli("generate", "--from", tmp_path / "x.png", "--out", tmp_path / "again.png").code == 0
    assert np.array_equal(pixels(tmp_path / "again.png"), np.asarray(drawn))


def test_a_picture_is_an_ordinary_pil_image(drawn: Picture, tmp_path: Path) -> None:
    assert drawn.size == (32, 32)
    assert drawn.copy() == drawn.copy()
    assert drawn.convert("L").mode == "L"
    assert drawn.resize((8, 8)).crop((0, 0, 4, 4)).size == (4, 4)
    assert drawn.copy().info == drawn.info
    drawn.save(tmp_path / "a.jpg", quality=90)
    drawn.save(tmp_path / "a.webp", lossless=True)
    assert np.array_equal(pixels(tmp_path / "a.webp"), np.asarray(drawn))


def test_a_picture_survives_pickling(drawn: Picture, tmp_path: Path) -> None:
    back = pickle.loads(pickle.dumps(drawn))
    assert np.array_equal(np.asarray(back), np.asarray(drawn))
    assert back.info == drawn.info
    back.save(tmp_path / "a.png")
    assert text(tmp_path / "a.png", "reverie") == drawn.info["reverie"]


def test_a_copy_carries_its_request_too(drawn: Picture, tmp_path: Path) -> None:
    drawn.copy().save(tmp_path / "a.png")
    assert text(tmp_path / "a.png", "reverie") == drawn.info["reverie"]


def test_what_the_caller_writes_down_wins(drawn: Picture, tmp_path: Path) -> None:
    drawn.save(tmp_path / "bare.png", pnginfo=None)
    with Image.open(tmp_path / "bare.png") as image:
        assert "reverie" not in image.info
