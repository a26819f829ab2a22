"""`reverie plan`, `--memory` and `generate --verbose`."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from reverie.adapters.control_files import save_control
from reverie.families.detect import load_parts
from reverie.nets.controlnet import ControlNet
from reverie.nets.unet import UNet
from tests.adapters import loras
from tests.apps.commandline import CommandLine


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_plan_is_a_table(cli: CommandLine, folder: Path) -> None:
    ran = cli("plan", "a cat", "--model", folder, "--device", "cpu", "--count", "3")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].startswith("3 pictures, 1 at a time: 32x32, 2 steps of ")
    assert lines[1].split() == ["part", "place", "precision", "asked", "TFLOP", "weights", "activations"]
    assert [line.split()[0] for line in lines[2:5]] == ["text_encoder", "unet", "vae"]
    assert [line.split()[0] for line in lines[6:]] == ["memory", "time", "work", "VAE"]
    assert "nothing was drawn with such a model here yet" in ran.out


def test_a_plan_for_programs(cli: CommandLine, folder: Path) -> None:
    ran = cli("plan", "a cat", "--model", folder, "--device", "cpu", "--json", "--memory", "1G")
    found = json.loads(ran.out)
    assert {part["name"]: part["evaluations"] for part in found["parts"]}["unet"] == 2
    assert found["own"] + found["mapped"] < found["limit"] == 2**30
    assert found["measures"] == {
        "batch": 1, "tile": None, "offload": False, "packed": False, "blocks": False, "slices": None
    }  # fmt: skip
    assert found["seconds"]["likely"] is None
    assert found["seconds"]["low"] < found["seconds"]["high"]


def test_plan_takes_what_generate_takes(cli: CommandLine) -> None:
    def options(command: str) -> set[str]:
        return {word for word in cli(command, "--help").out.split() if word.startswith("--")}

    drawing_alone = {"--out", "--preview", "--preview-out", "--preview-decoder", "--metadata", "--no-metadata"}
    missing = options("generate") - options("plan") - drawing_alone - {"--verbose"}
    assert not {name for name in missing if "/" not in name and not name.endswith(("…", "..."))}


def test_verbose_compares_the_plan_with_what_happened(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    words = ("generate", "a cat", "--model", folder, "--device", "cpu", "--seed", "1", "-o", tmp_path / "a.png")
    told = cli(*words, "-v")
    assert told.code == 0, told.err
    assert "planned: " in told.err
    assert "used: " in told.err
    ran = cli(*words, "--verbose", "--json")
    done = json.loads(ran.out.splitlines()[-1])
    assert done["event"] == "done"
    assert done["planned"]["own"] > 0
    assert done["planned"]["seconds"]["likely"] is not None  # the first picture was remembered
    assert done["used"]["seconds"] > 0
    plain = cli(*words, "--json")
    assert "planned" not in json.loads(plain.out.splitlines()[-1])


def test_a_limit_that_nothing_keeps_is_refused(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    for command in (("plan",), ("generate", "-o", tmp_path / "a.png")):
        line = cli.refused(*command, "a cat", "--model", folder, "--device", "cpu", "--memory", "100K")
        assert "memory is limited to 100 KiB, and this request takes" in line
    assert not (tmp_path / "a.png").exists()


def test_a_limit_that_is_no_size_is_refused(cli: CommandLine, folder: Path) -> None:
    line = cli.refused("plan", "a cat", "--model", folder, "--memory", "lots")
    assert "memory is 'lots'; expected a size such as 6G or 800M" in line


def test_nothing_to_plan_is_refused(cli: CommandLine) -> None:
    assert "there is no prompt" in cli.refused("plan")


def test_adapters_are_in_the_plan(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    """A LoRA's own weights, a textual inversion, and a ControlNet's evaluations: on half of the steps."""
    parts = load_parts(folder)
    loras.kohya(parts).save(tmp_path / "style.safetensors")
    save_file({"emb_params": torch.ones(2, 64)}, tmp_path / "toy.safetensors")
    assert isinstance(parts.unet, UNet)
    save_control(tmp_path / "net", ControlNet.from_unet(parts.unet, widths=(16, 16, 16, 16)), torch.float32)
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    control = f"canny:{tmp_path / 'picture.png'}:0.9:0:0.5:net={tmp_path / 'net'},preprocessor=none"
    flags = ("--lora", tmp_path / "style.safetensors", "--embedding", f"toy={tmp_path / 'toy.safetensors'}",
             "--control", control, "--steps", 8, "--device", "cpu")  # fmt: skip
    plain, dressed = (
        json.loads(cli("plan", "a toy", "--model", folder, *given, "--json").out) for given in (flags[-4:], flags)
    )
    before, after = ({part["name"]: part for part in found["parts"]} for found in (plain, dressed))
    assert before.keys() | {"control: net", "control: net (picture)"} == after.keys()
    assert before["unet"]["weights"]["own"] == 0 < after["unet"]["weights"]["own"]
    assert after["control: net"]["evaluations"] == 4
    assert after["control: net (picture)"]["evaluations"] == 1
    assert 0.2 < after["control: net"]["tflop"] / after["unet"]["tflop"] < 0.5  # half a U-Net, on half of the steps
    assert dressed["own"] > plain["own"]
