"""The vocabulary that is trained on captions: CLIP's layout, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipes.emoji import vocabulary

from tests.train.scenes.world import write_world


def test_byte_alphabet_is_clips() -> None:
    letters = vocabulary.byte_alphabet()
    assert len(set(letters)) == 256
    assert letters[:3] == ["!", '"', "#"] and letters[93:95] == ["~", "¡"]
    assert letters[188:190] == ["Ā", "ā"] and letters[-1] == "Ń"


def test_distinct_merges_keep_numbers_and_lines_together() -> None:
    merges = vocabulary.distinct_merges([("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c"), ("d", "e")], 4)
    assert merges == [("a", "b"), ("b", "c"), ("a", "bc"), ("d", "e")]


def test_vocabulary_files_have_clips_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "CAPTIONS", 300)
    write_world(tmp_path)
    (tmp_path / "words.txt").write_text("zebra, animal\nzebra, stripes\n", encoding="utf-8")
    assert vocabulary.main(["--data", str(tmp_path), "--out", str(tmp_path / "v"), "--size", "800"]) == 0
    tokens = json.loads((tmp_path / "v" / "vocab.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "v" / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#version: 0.2"
    assert list(tokens.values()) == list(range(len(tokens)))
    assert list(tokens)[:512] == vocabulary.base_tokens()
    assert list(tokens)[512:-2] == ["".join(line.split(" ")) for line in lines[1:]]
    assert list(tokens)[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert {"apple</w>", "background</w>", "unicorns</w>"} <= set(tokens)


def test_vocabulary_without_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vocabulary.main(["--data", str(tmp_path), "--out", str(tmp_path / "v")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "build the sprites first" in message
