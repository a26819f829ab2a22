"""The folder of wildcards: names and globs, lines, and nothing from outside it."""

import os
from pathlib import Path

import pytest

from reverie.errors import RequestError
from reverie.text import wildcard_files
from reverie.text.wildcard_files import Wildcards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "wildcards"
    files = {
        "colours.txt": b"\xef\xbb\xbfred\r\n  green \r\n\r\n# no colour\r\nred\r\nblue # a colour",
        "Upper.TXT": b"up",
        "animals/birds.txt": b"crow\nowl",
        "animals/sea/fish.txt": b"cod",
        "animals/sea/whales.txt": "blåhval".encode(),
        "empty.txt": b"# nothing\n\n",
        "latin.txt": b"caf\xe9",
        "notes.md": b"not a wildcard",
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (tmp_path / "secret.txt").write_text("secret")
    return root


def test_names_are_sorted(folder: Path) -> None:
    assert Wildcards(folder).names == [
        "Upper", "animals/birds", "animals/sea/fish", "animals/sea/whales", "colours", "empty", "latin",
    ]  # fmt: skip


def test_lines_without_comments_blanks_and_repetitions(folder: Path) -> None:
    wildcards = Wildcards(folder)
    assert wildcards.lines("colours") == ["red", "green", "blue # a colour"]
    assert wildcards.lines("Upper") == ["up"]
    assert wildcards.lines("animals/sea/whales") == ["blåhval"]


@pytest.mark.parametrize(
    ("glob", "lines"),
    [
        ("animals/*", ["crow", "owl"]),
        ("*", ["up", "red", "green", "blue # a colour"]),
        ("animals/**", ["crow", "owl", "cod", "blåhval"]),
        ("**/fish", ["cod"]),
        ("**/sea/**/fish", ["cod"]),
        ("**/*s", ["crow", "owl", "blåhval", "red", "green", "blue # a colour"]),
        ("animals/sea/?ish", ["cod"]),
        ("animals/sea/[fw]*", ["cod", "blåhval"]),
    ],
)
def test_globs_take_the_lines_of_all_that_match(glob: str, lines: list[str], folder: Path) -> None:
    (folder / "latin.txt").unlink()
    assert Wildcards(folder).lines(glob) == lines


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret", "not a name within the folder of wildcards"),
        ("animals/../../secret", "not a name within the folder of wildcards"),
        ("/etc/passwd", "not a name within the folder of wildcards"),
        ("C:/secret", "not a name within the folder of wildcards"),
        ("..\\secret", "not a name within the folder of wildcards"),
        ("a\0b", "not a name within the folder of wildcards"),
        ("animals//birds", "not a name within the folder of wildcards"),
        ("../*", "not a name within the folder of wildcards"),
        ("colors", "unknown wildcard 'colors'; did you mean 'colours'?"),
        ("brids", "unknown wildcard 'brids'; did you mean 'animals/birds'?"),
        ("xyz", "unknown wildcard 'xyz'; known: Upper, animals/birds, animals/sea/fish"),
        ("notes", "unknown wildcard 'notes'"),
        ("animals/x*", "unknown wildcard 'animals/x*'"),
        ("empty", "wildcard 'empty' has no lines"),
        ("latin", "is not text in UTF-8: save it as UTF-8"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(name: str, message: str, folder: Path) -> None:
    with pytest.raises(RequestError) as caught:
        Wildcards(folder).lines(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_lead_nowhere_else(folder: Path) -> None:
    (folder / "link.txt").symlink_to(folder.parent / "secret.txt")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "inside.txt").symlink_to(folder / "animals" / "birds.txt")
    wildcards = Wildcards(folder)
    assert not any(name.startswith("loop") for name in wildcards.names)
    assert wildcards.lines("inside") == ["crow", "owl"]
    with pytest.raises(RequestError, match="is a link out of the folder of wildcards"):
        wildcards.lines("link")
    (folder / "broken.txt").symlink_to(folder / "gone.txt")
    with pytest.raises(RequestError, match="unknown wildcard 'broken'"):
        Wildcards(folder).lines("broken")


def test_a_file_that_has_gone_is_refused(folder: Path) -> None:
    wildcards = Wildcards(folder)
    assert "colours" in wildcards.names
    (folder / "colours.txt").unlink()
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        wildcards.lines("colours")


def test_a_file_that_is_too_large_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wildcard_files, "LARGEST", 1 << 20)
    (folder / "large.txt").write_bytes(b"a\n" * (1 << 19) + b"b")
    with pytest.raises(RequestError, match="larger than 1 MiB"):
        Wildcards(folder).lines("large")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.txt")
    with pytest.raises(RequestError, match="unknown wildcard 'pipe'"):
        Wildcards(folder).lines("pipe")


def test_a_file_is_read_once_and_a_new_folder_object_reads_anew(folder: Path) -> None:
    wildcards = Wildcards(folder)
    assert wildcards.lines("animals/birds") == ["crow", "owl"]
    (folder / "animals" / "birds.txt").write_text("emu")
    assert wildcards.lines("animals/birds") == ["crow", "owl"]
    assert Wildcards(folder).lines("animals/birds") == ["emu"]


def test_no_folder(tmp_path: Path) -> None:
    assert Wildcards().names == []
    with pytest.raises(RequestError, match="no folder of wildcards was given"):
        Wildcards().lines("x")
    with pytest.raises(RequestError, match="does not exist"):
        Wildcards(tmp_path / "gone").lines("x")
    with pytest.raises(RequestError, match=r"there is no \.txt file in"):
        Wildcards(tmp_path).lines("x")
