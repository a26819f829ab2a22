"""The emoji recipe's own decisions: which emoji, which words, where on the canvas. No network needed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

RECIPE = Path(__file__).parents[2] / "recipes" / "emoji"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"emoji_recipe_{name}", RECIPE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


build = load("build")
vocabulary = load("vocabulary")
WORDS = build.load_words()


def entry(label: str, hexcode: str, group: str = "food-drink", subgroup: str = "food-fruit") -> object:
    return build.Entry(label, hexcode, group, subgroup, ("fruit", "red"), ())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red apple", "a red apple"),
        ("orange", "an orange"),
        ("unicorn", "a unicorn"),
        ("ewe", "a ewe"),
        ("hourglass", "an hourglass"),
        ("grapes", "grapes"),
        ("bus", "a bus"),
        ("glass of milk", "a glass of milk"),
        ("green salad", "a green salad"),
        ("person lifting weights", "a person lifting weights"),
        ("statue of liberty", "the statue of liberty"),
        ("crossed swords", "crossed swords"),
        ("smiling face with sunglasses", "a smiling face with sunglasses"),
    ],
)
def test_articles(name: str, expected: str) -> None:
    assert build.with_article(name, WORDS) == expected


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("T-Rex", "t-rex"),
        ("person: red hair", "person with red hair"),
        ("person: beard", "person with a beard"),
        ("person: bald", "bald person"),
        ("woman’s hat", "woman's hat"),
        ("locked", "locked padlock"),
    ],
)
def test_natural_names(label: str, expected: str) -> None:
    assert build.natural_name(label, WORDS) == expected


@pytest.mark.parametrize(
    ("label", "hexcode", "group", "subgroup", "kept"),
    [
        ("red apple", "1F34E", "food-drink", "food-fruit", True),
        ("artist", "1F9D1-200D-1F3A8", "people-body", "person-role", True),
        ("man artist", "1F468-200D-1F3A8", "people-body", "person-role", False),
        ("woman running", "1F3C3-200D-2640-FE0F", "people-body", "person-activity", False),
        ("mermaid", "1F9DC-200D-2640-FE0F", "people-body", "person-fantasy", True),
        ("woman", "1F469", "people-body", "person", True),
        ("three o’clock", "1F552", "travel-places", "time", True),
        ("four-thirty", "1F55F", "travel-places", "time", False),
        ("alarm clock", "23F0", "travel-places", "time", True),
        ("flag: France", "1F1EB-1F1F7", "flags", "country-flag", False),
        ("keycap: 1", "31-FE0F-20E3", "symbols", "keycap", False),
        ("red circle", "1F534", "symbols", "geometric", True),
        ("middle finger", "1F595", "people-body", "hand-single-finger", False),
    ],
)
def test_selection(label: str, hexcode: str, group: str, subgroup: str, kept: bool) -> None:
    assert build.is_kept(entry(label, hexcode, group, subgroup), WORDS) is kept


def test_a_synonym_of_too_many_concepts_is_dropped() -> None:
    names = ["alpha", "beta", "gamma", "delta"]
    common = build.Words({name: ["thing", f"other {name}"] for name in names}, {}, *[frozenset()] * 6)
    concepts = build.choose_concepts([entry(name, f"1F{n}") for n, name in enumerate(names)], common)
    assert [concept.synonyms for concept in concepts] == [(f"other {name}",) for name in names]


def test_a_synonym_never_takes_the_name_of_another_concept() -> None:
    words = build.Words({"alpha": ["beta"]}, {}, *[frozenset()] * 6)
    concepts = build.choose_concepts([entry("alpha", "1"), entry("beta", "2")], words)
    assert concepts[0].synonyms == ()


def test_only_flat_captions_may_name_no_style() -> None:
    concept = build.Concept("red apple", "1F34E", "food-drink", "food-fruit", ("fruit", "red"), ("apple",))
    flat = build.captions_for(concept, "flat", WORDS)
    assert {"red apple", "a red apple", "an apple", "a red apple, flat style", "flat red apple"} <= set(flat)
    assert "red apple, fruit" in flat
    marks = {"3d": "3D", "noto": "noto style", "twemoji": "twemoji style"}
    assert set(marks) | {"flat"} == {style.key for style in build.STYLES}
    for style, mark in marks.items():
        captions = build.captions_for(concept, style, WORDS)
        assert len(captions) >= 6
        assert all(mark in caption for caption in captions)
        assert not any(mark in caption for caption in flat)


def test_faces_are_also_called_smileys() -> None:
    concept = build.Concept("smiling face with sunglasses", "1F60E", "smileys-emotion", "face-glasses", (), ())
    assert "a smiley with sunglasses" in build.captions_for(concept, "flat", WORDS)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(100, 100, (4, 4, 56, 56)), (200, 100, (4, 18, 56, 28)), (1, 1000, (31, 4, 1, 56))],
)
def test_fit_box(width: int, height: int, expected: tuple[int, int, int, int]) -> None:
    assert build.fit_box(width, height, 64, build.margin_for(64)) == expected


def test_place_crops_and_centres_on_white() -> None:
    image = Image.new("RGBA", (256, 256), (0, 0, 0, 0))  # transparent black: must not show
    image.paste((255, 0, 0, 255), (10, 20, 110, 70))
    pixels = build.place(image, 64)
    ink = np.argwhere((pixels != 255).any(axis=-1))
    assert ink.min(axis=0).tolist() == [18, 4] and ink.max(axis=0).tolist() == [45, 59]
    assert pixels[20:44, 6:58, 1:].max() <= 16  # the filter overshoots a little near edges
    assert (pixels[..., 0] == 255).all()  # red and white only: no dark fringe
    assert build.place(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 64) is None


def test_wrong_package_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in build.PACKAGES:
        (tmp_path / package.file_name).write_bytes(b"not the archive")
    code = build.main(["--out", str(tmp_path / "out"), "--packages", str(tmp_path)])
    message = capsys.readouterr().err
    assert code == 2
    assert message.count("\n") == 1 and "expected" in message and "delete the file" in message


def test_missing_npm_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert build.main(["--out", str(tmp_path / "out")]) == 2
    assert "npm is not installed" in capsys.readouterr().err


def test_package_file_names() -> None:
    assert [package.file_name for package in build.PACKAGES] == [
        "iconify-json-2.2.535.tgz",
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "emojibase-data-17.0.0.tgz",
    ]


def test_byte_alphabet_is_clips() -> None:
    letters = vocabulary.byte_alphabet()
    assert len(set(letters)) == 256
    assert letters[:3] == ["!", '"', "#"] and letters[93:95] == ["~", "¡"]
    assert letters[188:190] == ["Ā", "ā"] and letters[-1] == "Ń"


def test_distinct_merges_keep_numbers_and_lines_together() -> None:
    merges = vocabulary.distinct_merges([("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c"), ("d", "e")], 4)
    assert merges == [("a", "b"), ("b", "c"), ("a", "bc"), ("d", "e")]


def test_vocabulary_files_have_clips_order(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text(json.dumps({"captions": ["a red apple", "red apple, 3D"]}) + "\n")
    (tmp_path / "words.txt").write_text("apple, fruit\n")
    assert vocabulary.main(["--data", str(tmp_path), "--out", str(tmp_path / "v"), "--size", "600"]) == 0
    tokens = json.loads((tmp_path / "v" / "vocab.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "v" / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#version: 0.2"
    assert list(tokens.values()) == list(range(len(tokens)))
    assert list(tokens)[:512] == vocabulary.base_tokens()
    assert list(tokens)[512:-2] == ["".join(line.split(" ")) for line in lines[1:]]
    assert list(tokens)[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert "apple</w>" in tokens and "red</w>" in tokens


def test_vocabulary_without_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vocabulary.main(["--data", str(tmp_path), "--out", str(tmp_path / "v")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "not found" in message
