"""Adapter files by name, and their hashes."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reverie.adapters.files import digest, find
from reverie.errors import RequestError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Some files, one with the name that its trainer gave it."""
    (tmp_path / "styles" / "deep").mkdir(parents=True)
    for name in ("Ink.safetensors", "styles/Oil v2.safetensors", "styles/deep/wash.pt", "face.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    save_file({"a": torch.zeros(1)}, tmp_path / "1234.safetensors", {"ss_output_name": "Water Colour"})
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Ink", "Ink.safetensors"), ("ink", "Ink.safetensors"), ("INK.SAFETENSORS", "Ink.safetensors"),
        ("Oil v2", "styles/Oil v2.safetensors"), ("styles/Oil v2", "styles/Oil v2.safetensors"),
        ("styles\\oil v2.safetensors", "styles/Oil v2.safetensors"), ("wash", "styles/deep/wash.pt"),
        ("styles/deep/wash.pt", "styles/deep/wash.pt"), ("water colour", "1234.safetensors"),
        ("1234", "1234.safetensors"),
    ],
)  # fmt: skip
def test_find(folder: Path, name: str, found: str) -> None:
    assert find(name, [folder]) == folder / found


def test_find_by_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(str(folder / "styles" / "deep" / "wash.pt"), []) == folder / "styles/deep/wash.pt"
    monkeypatch.chdir(folder)
    assert find("Ink.safetensors", []) == Path("Ink.safetensors")


@pytest.mark.parametrize("name", ["Inc", "nothing", "", "\0", "../Ink", "x" * 5000, "wash\nx", "notes", "face"])
def test_not_found(folder: Path, name: str) -> None:
    with pytest.raises(RequestError) as raised:
        find(name, [folder / "styles", folder / "no such folder"] if name == "../Ink" else [folder])
    assert "\n" not in str(raised.value)


def test_near_names_are_suggested(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"no LoRA 'Inkk' in .*; did you mean Ink"):
        find("Inkk", [folder])


def test_embeddings_may_be_pictures(folder: Path) -> None:
    assert find("face", [folder], "embedding") == folder / "face.png"
    with pytest.raises(RequestError, match="no embedding 'nobody'"):
        find("nobody", [folder], "embedding")


def test_two_files_of_one_name(folder: Path) -> None:
    """The exact name goes first; a link to the same file is not another."""
    (folder / "linked.safetensors").symlink_to(folder / "Ink.safetensors")
    (folder / "again").mkdir()
    (folder / "again" / "Ink.safetensors").symlink_to(folder / "Ink.safetensors")
    assert find("Ink", [folder, folder]).resolve() == folder / "Ink.safetensors"
    (folder / "styles" / "ink.safetensors").write_bytes(b"y")
    assert find("ink", [folder]) == folder / "styles" / "ink.safetensors"
    with pytest.raises(RequestError, match=r"2 files are called 'INK': .*; give the path of one, or rename one"):
        find("INK", [folder])
    (folder / "Ink.pt").write_bytes(b"y")
    with pytest.raises(RequestError, match="2 files are called 'Ink'"):
        find("Ink", [folder])
    assert find("Ink.pt", [folder]) == folder / "Ink.pt"


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"headerdata" * 200_000)
    assert digest(tmp_path / "a") == hashlib.sha256(b"headerdata" * 200_000).hexdigest()
    assert digest(tmp_path / "a", 6) == hashlib.sha256((b"headerdata" * 200_000)[6:]).hexdigest()
