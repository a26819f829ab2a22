"""`reverie tune`: measures, remembers, refuses; `--fast auto` then draws with what it found."""

import json
from pathlib import Path

import pytest
from PIL import Image

from reverie.engine.metadata.read import read_metadata
from tests.apps.commandline import CommandLine


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own for settings and hashes."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "config" / "reverie" / "fast.json"


def test_tune_and_draw(cli: CommandLine, folder: Path, tmp_path: Path, config: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\n\n")
    words = ["tune", folder, "--steps", 2, "--prompts", prompts, "--size", "32x32"]
    ran = cli(*words, "--budget", "psnr=0", "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    names = {one["name"] for one in said["measured"]}
    assert {"cache, interval 2", "token merging 0.5", "guidance to 0.6 of the steps"} <= names
    assert all(m["inside"] and m["psnr"] > 0 for m in said["measured"])
    assert Path(said["file"]) == config and config.exists()
    out = tmp_path / "a.png"
    ran = cli("generate", "apple", "--model", folder, "--steps", 2, "--fast", "auto", "--seed", 1, "--out", out)
    assert ran.code == 0, ran.err
    chosen = read_metadata(out).request
    assert {name for name in said["fields"] if name != "guidance_end"} <= {
        name for name in ("cache", "token_merging") if getattr(chosen, name) is not None
    }
    again = tmp_path / "b.png"
    config.unlink()
    assert cli("generate", "--from", out, "--out", again).code == 0
    with Image.open(out) as one, Image.open(again) as other:
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "much"], "expected psnr=35, ssim=0.95 or lpips=0.05"),
        (["--size", "big"], "size is 'big'; expected pixels, 512 or 512x768"),
        (["--prompts", "nowhere.txt"], "cannot read the prompts in nowhere.txt"),
        (["--lpips", "nowhere"], "no LPIPS in nowhere"),
        (["--budget", "lpips=0.1"], "name their folder with --lpips"),
    ],
)
def test_tune_refuses_in_one_line(cli: CommandLine, folder: Path, words: list[str], said: str) -> None:
    assert said in cli.refused("tune", folder, *words)
