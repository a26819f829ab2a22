"""What is kept of files: it is found again by other processes, and forgotten when a file changes."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

import reverie
from reverie.engine import bundle, hashes, remembered
from reverie.engine.hashes import hash_paths
from reverie.engine.remembered import Remembered, key_of
from reverie.errors import CheckpointError
from tests import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in which even small files are worth a note; nothing is kept in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "LARGE", 1)
    hashes._digest.cache_clear()
    return tmp_path / "cache" / "reverie" / "files.json"


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("read again")


def test_a_hash_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"one")
    assert hash_paths([path]) == hashlib.sha256(b"one").hexdigest()
    hashes._digest.cache_clear()  # as another process
    with monkeypatch.context() as patched:
        patched.setattr(hashes, "_read", refuse)
        assert hash_paths([path]) == hashlib.sha256(b"one").hexdigest()
        path.write_bytes(b"other")
        with pytest.raises(AssertionError, match="read again"):
            hash_paths([path])
    assert hash_paths([path]) == hashlib.sha256(b"other").hexdigest()


def test_what_two_processes_note_is_both_kept(cache: Path) -> None:
    one, other = Remembered(cache), Remembered(cache)
    assert one.get("a") is None
    other.note("b", "2")
    one.note("a", "1")
    assert [Remembered(cache).get(key) for key in "ab"] == ["1", "2"]


@pytest.mark.parametrize("text", ["", "[1]", "{", "null"])
def test_a_broken_file_is_as_none(cache: Path, text: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text, encoding="utf-8")
    memory = Remembered(cache)
    assert memory.get("a") is None
    memory.note("a", "1")
    assert Remembered(cache).get("a") == "1"


def test_a_folder_that_cannot_be_written_is_only_slower(cache: Path) -> None:
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("a file", encoding="utf-8")
    memory = Remembered(cache)
    memory.note("a", "1")
    assert memory.get("a") == "1"


def test_sound_weights_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.model(tmp_path, "sd1", merges_kept=500)

    def read() -> None:
        model = reverie.load(folder, device="cpu", precision="float32")
        model.ready("unet", model.parts.unet)

    read()
    with monkeypatch.context() as patched:
        patched.setattr(bundle, "check_numbers", refuse)
        read()
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(unet.read_bytes())
    data[-4:] = torch.tensor([torch.nan]).numpy().tobytes()
    unet.write_bytes(data)
    with pytest.raises(CheckpointError, match="NaN"):
        read()


def test_a_key_is_of_path_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1")
    before = key_of("x", [path])
    path.write_bytes(b"12")
    assert key_of("x", [path]) != before
    assert key_of("y", [path]) != key_of("x", [path])
