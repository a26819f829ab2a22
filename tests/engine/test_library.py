"""Models in the folders of other programs, found by name and by hash."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from reverie.apps.modelling import run_list, run_pull
from reverie.checkpoint.save import write_weights
from reverie.engine.bundle import load
from reverie.engine.image import fingerprint
from reverie.engine.library import Found, Library
from reverie.errors import ConfigError, RequestError
from tests.apps import models


def weights(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_weights(path, {"t": torch.full((400_000,), float(seed))})
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def library(home: Path, *folders: Path, **env: str) -> Library:
    known = {"XDG_CONFIG_HOME": str(home / "config"), "XDG_CACHE_HOME": str(home / "cache")}
    return Library.of_environment({**known, "REVERIE_MODELS": os.pathsep.join(map(str, folders)), **env})


def names(found: list[Found]) -> list[str]:
    return [model.name for model in found]


def test_folders_of_other_programs_are_read_in_place(tmp_path: Path) -> None:
    a, c, i, own = (tmp_path / name for name in ("a1111", "comfy", "invoke", "own"))
    weights(a / "models/Stable-diffusion/deep/one.safetensors")
    weights(a / "models/Lora/style.safetensors")
    weights(c / "models/checkpoints/two.ckpt")
    weights(c / "models/diffusion_models/three.gguf")
    weights(c / "models/vae/vae.safetensors")
    weights(i / "models/sd-1/main/four.safetensors")
    weights(i / "models/sd-1/lora/style.safetensors")
    (i / "invokeai.yaml").write_text("a: 1")
    models.folder(own / "five")
    weights(own / "six.safetensors")
    weights(own / "Loras/style.safetensors")
    weights(own / ".hidden/seven.safetensors")
    (own / "notes.txt").write_text("none")
    found = library(tmp_path, a, c, i, own, tmp_path / "gone").models()
    assert [(m.name, m.where) for m in found] == [
        ("five", "folder"), ("four", "InvokeAI"), ("one", "A1111"), ("six", "folder"), ("three", "ComfyUI"),
        ("two", "ComfyUI"),
    ]  # fmt: skip
    six = next(m for m in found if m.name == "six")
    assert six.size == six.path.stat().st_size and six.sha256 == ""


def test_the_cache_of_the_hub_is_read_in_place(tmp_path: Path) -> None:
    pinned, old = "1" * 40, "2" * 40
    root = tmp_path / "hub/models--org--pipe"
    for commit in (pinned, old):
        models.folder(root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs/main").write_text(pinned)
    weights(tmp_path / "hub/models--org--files" / "snapshots" / old / "x.safetensors")
    lib = library(tmp_path, HF_HUB_CACHE=str(tmp_path / "hub"))
    assert names(lib.models()) == ["org/files/x", "org/pipe"]
    assert lib.resolve("org/pipe") == lib.resolve("pipe") == root / "snapshots" / pinned


def test_the_config_file_names_folders(tmp_path: Path) -> None:
    weights(tmp_path / "own/one.safetensors")
    config = tmp_path / "config/reverie/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f'[models]\nfolders = ["{tmp_path / "own"}"]\n')
    assert names(library(tmp_path).models()) == ["one"]
    for broken in ("[models", "[models]\nfolders = 3\n", "models = 3\n"):
        config.write_text(broken)
        with pytest.raises(ConfigError, match=r"config\.toml"):
            library(tmp_path)


def test_search_wants_every_word(tmp_path: Path) -> None:
    for name in ("anime-xl", "anime-15", "real-xl"):
        weights(tmp_path / "own" / f"{name}.safetensors")
    lib = library(tmp_path, tmp_path / "own")
    assert names(lib.models("XL anime")) == ["anime-xl"] and names(lib.models("none")) == []


@pytest.mark.parametrize("name", ["One", "One.safetensors", "one", "ONE.SAFETENSORS"])
def test_a_name_is_a_file_or_its_stem(tmp_path: Path, name: str) -> None:
    path = weights(tmp_path / "own/One.safetensors")
    assert library(tmp_path, tmp_path / "own").resolve(name) == path
    assert library(tmp_path).resolve(str(path)) == path


def test_a_hash_finds_its_model(tmp_path: Path) -> None:
    one, two = (weights(tmp_path / f"own/{n}.safetensors", n) for n in (1, 2))
    lib = library(tmp_path, tmp_path / "own")
    for digits in (10, 64):
        assert lib.resolve(sha256(two)[:digits].upper()) == two
    with one.open("rb") as file:
        file.seek(0x100000)
        old = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    assert library(tmp_path, tmp_path / "own").resolve(old) == one
    with pytest.raises(RequestError, match="none of 2 models has a hash that begins with 00000000aa"):
        lib.resolve("00000000aa")


def test_hashes_are_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights(tmp_path / "own/one.safetensors")
    steps: list[tuple[int, int]] = []
    lib = library(tmp_path, tmp_path / "own")
    (found,) = lib.hashed(lib.models(), lambda done, total: steps.append((done, total)))
    assert found.sha256 == sha256(path) and found.short == sha256(path)[:10] and steps == [(1, 1)]

    def never(files: Any) -> str:
        raise AssertionError("hashed again")

    fresh = library(tmp_path, tmp_path / "own")
    with monkeypatch.context() as patched:
        patched.setattr("reverie.engine.library.hash_paths", never)
        assert fresh.models()[0].sha256 == found.sha256
        assert fresh.resolve(found.short) == path
    weights(path, 7)
    os.utime(path, ns=(1, 1))
    assert library(tmp_path, tmp_path / "own").models()[0].sha256 == ""


def test_the_hash_is_the_one_in_pictures(tmp_path: Path) -> None:
    folder = models.folder(tmp_path / "own/five")
    lib = library(tmp_path, tmp_path / "own")
    (found,) = lib.hashed(lib.models())
    assert found.sha256 == fingerprint(load(folder, device="cpu"))["hash"]


def test_what_cannot_be_found_is_one_clear_line(tmp_path: Path) -> None:
    weights(tmp_path / "own/a/dream.safetensors")
    weights(tmp_path / "own/b/dream.safetensors", 1)
    lib = library(tmp_path, tmp_path / "own")
    with pytest.raises(RequestError, match=r"2 models are called 'dream': .* give the path of one"):
        lib.resolve("dream")
    with pytest.raises(RequestError, match=r"no model 'dreem': .* did you mean dream"):
        lib.resolve("dreem")
    with pytest.raises(RequestError, match=r"2 models are known.*reverie models pull org/none fetches it"):
        lib.resolve("org/none")


def test_a_broken_folder_has_no_hash_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "own/broken").mkdir(parents=True)
    (tmp_path / "own/broken/model_index.json").write_text("no JSON")
    weights(tmp_path / "own/one.safetensors")
    lib = library(tmp_path, tmp_path / "own")
    assert [bool(m.sha256) for m in lib.hashed(lib.models())] == [False, True]


def test_the_command_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights(tmp_path / "own/one.safetensors")
    for key, value in (("REVERIE_MODELS", "own"), ("XDG_CACHE_HOME", "cache"), ("XDG_CONFIG_HOME", "config")):
        monkeypatch.setenv(key, str(tmp_path / value))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    run_list("", hashes=True, as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {"name": "one", "path": str(path), "where": "folder", "size": path.stat().st_size,
                   "hash": sha256(path)[:10]}  # fmt: skip
    run_list("one", hashes=False, as_json=False)
    assert capsys.readouterr().out.split() == ["one", sha256(path)[:10], "1.6", "MB", "folder", str(path)]
    run_list("none", hashes=False, as_json=False)
    assert "no models found" in capsys.readouterr().err


def test_the_command_pulls_from_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.folder(tmp_path / "hub/models--org--pipe/snapshots" / ("1" * 40))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("REVERIE_OFFLINE", "1")
    run_pull("org/pipe", {"revision": "1" * 40}, as_json=False)
    assert capsys.readouterr().out.strip() == str(folder)
