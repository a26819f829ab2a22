"""The emoji recipe's own decisions: which emoji, which words, which drawing, what is written. No network needed."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recipes.emoji import build, concepts, drawing, english, packages, styles

from reverie.train.scenes.sprites import open_sprites

WORDS = concepts.load_words()


def entry(
    label: str, hexcode: str, group: str = "food-drink", subgroup: str = "food-fruit", codes: tuple[str, ...] = ()
) -> concepts.Entry:
    return concepts.Entry(label, hexcode, group, subgroup, ("fruit", "red"), codes, {"de": f"{label} (de)"})


def some_words(**lists: object) -> concepts.Words:
    empty: dict[str, object] = {
        **dict.fromkeys(("bad_codes", "symbols", "left_out", "no_article", "definite"), frozenset()),
        **dict.fromkeys(("singular_s", "uncounted"), frozenset()),
        "synonyms": {},
        "names": {},
        "known": (),
    }
    return concepts.Words(**{**empty, **lists})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "article"),
    [
        ("red apple", "a"),
        ("grapes", ""),
        ("bus", "a"),
        ("glass of milk", "a"),
        ("green salad", "a"),
        ("person lifting weights", "a"),
        ("statue of liberty", "the"),
        ("crossed swords", ""),
        ("smiling face with sunglasses", "a"),
        ("bread", ""),
    ],
)
def test_article_kinds(name: str, article: str) -> None:
    assert english.article_kind(name, WORDS.no_article, WORDS.definite, WORDS.singular_s) == article


@pytest.mark.parametrize(
    ("name", "many"),
    [
        ("fox", "foxes"),
        ("mouse", "mice"),
        ("mouse face", "mouse faces"),
        ("glass of milk", "glasses of milk"),
        ("person lifting weights", "people lifting weights"),
        ("person mountain biking", "people mountain biking"),
        ("face screaming in fear", "faces screaming in fear"),
        ("woman breast-feeding", "women breast-feeding"),
        ("smiling face with sunglasses", "smiling faces with sunglasses"),
        ("slightly frowning face", "slightly frowning faces"),
        ("butterfly", "butterflies"),
        ("monkey", "monkeys"),
        ("snowman", "snowmen"),
        ("policeman", "policemen"),
        ("human", "humans"),
        ("maple leaf", "maple leaves"),
        ("wolf", "wolves"),
        ("sheep", "sheep"),
        ("tropical fish", "tropical fish"),
        ("jellyfish", "jellyfish"),
        ("christmas tree", "christmas trees"),
        ("t-rex", "t-rexes"),
        ("jack-o-lantern", "jack-o-lanterns"),
        ("tooth", "teeth"),
        ("potato", "potatoes"),
        ("cherry blossom", "cherry blossoms"),
        ("red triangle pointed up", "red triangles pointed up"),
    ],
)
def test_plurals(name: str, many: str) -> None:
    assert english.plural(name) == many


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
    assert concepts.natural_name(label, WORDS) == expected


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
    assert concepts.is_kept(entry(label, hexcode, group, subgroup), WORDS) is kept


def test_a_synonym_of_too_many_concepts_is_dropped() -> None:
    names = ["alpha", "beta", "gamma", "delta"]
    common = some_words(synonyms={name: ["thing", f"other {name}"] for name in names})
    found = concepts.choose_concepts([entry(name, f"1F{n}") for n, name in enumerate(names)], common)
    assert [concept.synonyms for concept in found] == [(f"other {name}",) for name in names]


def test_a_synonym_takes_no_other_name_and_adds_no_colour() -> None:
    words = some_words(synonyms={"alpha": ["beta", "red alpha", "first"], "red gamma": ["red letter"]})
    found = concepts.choose_concepts([entry("alpha", "1"), entry("beta", "2"), entry("red gamma", "3")], words)
    assert [concept.synonyms for concept in found] == [("first",), (), ("red letter",)]


def test_short_codes_of_ordinary_words_are_synonyms() -> None:
    words = some_words(bad_codes=frozenset({"bad apple"}))
    apple = entry("red apple", "1", codes=("apple", "bad_apple", "xq"))
    found = concepts.choose_concepts([apple, entry("bad luck", "2", group="objects")], words)
    assert found[0].synonyms == ("apple",)


def test_the_known_come_first() -> None:
    words = some_words(known=("gamma", "alpha"))
    found = concepts.choose_concepts([entry(name, name) for name in ("alpha", "beta", "gamma", "delta")], words)
    assert [concept.name for concept in found] == ["gamma", "alpha", "beta", "delta"]


def test_the_known_are_real() -> None:
    assert len(WORDS.known) == len(set(WORDS.known)) > 300
    assert WORDS.known[:3] == ("red apple", "fox", "rocket")


def test_bare_names_belong_to_one_thing() -> None:
    names = ("red apple", "green apple", "black cat", "cat", "blue heart", "red heart", "large blue diamond")
    bare = concepts.bare_names(concepts.choose_concepts([entry(n, n) for n in names], some_words()))
    assert bare == {"red apple": "apple", "blue heart": "heart"}


def test_words_of_painted_things_name_no_colour() -> None:
    words = some_words(synonyms={"red apple": ["golden apple", "fruit"]})
    apple, grapes = concepts.choose_concepts([entry("red apple", "1"), entry("bow and arrow", "2")], words)
    found = {word.text: word for word in concepts.words_of(apple, concepts.bare_names([apple]), words)}
    assert list(found) == ["red apple", "golden apple", "fruit", "apple"]
    assert [word.plain for word in found.values()] == [False, False, False, True]
    assert found["red apple"].plural == "red apples"
    (pair,) = concepts.words_of(grapes, {}, words)
    assert pair.article == "a" and pair.plural is None


def icon_set(prefix: str, names: list[str], **more: object) -> dict[str, object]:
    return {"prefix": prefix, "icons": {name: {"body": ""} for name in names}, **more}


TABLE = styles.name_table(
    [("fox", "1F98A"), ("cat face", "1F431"), ("cat", "1F408"), ("alarm clock", "23F0"), ("eggplant", "1F346")],
    [icon_set("noto", ["t-shirt"], chars={"1f455": "t-shirt"})],
)


def test_names_come_from_labels_sets_and_unicode() -> None:
    assert TABLE["fox"] == "1f98a" and TABLE["alarmclock"] == "23f0"
    assert TABLE["tshirt"] == "1f455"
    assert TABLE["aubergine"] == "1f346"  # U+1F346 is AUBERGINE
    assert TABLE["foxface"] == "1f98a" and TABLE["catface"] == "1f431"  # U+1F98A is FOX FACE


def test_icons_are_found_by_code_or_whole_name() -> None:
    coded = icon_set("twemoji", ["a", "b"], chars={"1f98a": "a", "1f408": "gone"})
    assert styles.icons_by_code(coded, TABLE) == {"1f98a": "a"}
    named = icon_set(
        "emojione", ["fox-face", "alarm-clock-2", "foxes", "cat-1"], aliases={"aubergine": {"parent": "foxes"}}
    )
    assert styles.icons_by_code(named, TABLE) == {"1f98a": "fox-face", "1f408": "cat-1", "1f346": "foxes"}


def test_misnamed_icons_go_where_they_belong() -> None:
    fx = icon_set("fxemoji", ["cat", "catside", "pistol"])
    assert styles.icons_by_code(fx, {**TABLE, "pistol": "1f52b"}) == {"1f431": "cat", "1f408": "catside"}
    prefixes = {style.set_name for style in styles.STYLES}
    assert set(styles.MISNAMED) <= prefixes


def test_no_share_alike_set_is_used() -> None:
    assert {style.licence for style in styles.STYLES} == {"MIT", "Apache-2.0", "CC-BY-4.0"}
    assert len({style.key for style in styles.STYLES}) == len(styles.STYLES) == 11


@pytest.mark.parametrize(("box", "ink"), [((10, 20, 110, 70), (0, 16, 63, 47)), ((0, 0, 20, 200), (29, 0, 34, 63))])
def test_cut_out_fills_the_square(box: tuple[int, int, int, int], ink: tuple[int, int, int, int]) -> None:
    image = Image.new("RGBA", (256, 256), (0, 255, 0, 0))  # transparent green: must not show
    image.paste((255, 0, 0, 255), box)
    pixels = drawing.cut_out(image, 64)
    assert pixels is not None and pixels.shape == (64, 64, 4)
    rows, columns = np.nonzero(pixels[..., 3] > 127)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == ink
    assert pixels[pixels[..., 3] > 16][:, 1].max() <= 16  # red only: no green fringe


def test_an_empty_drawing_is_left_out() -> None:
    assert drawing.cut_out(Image.new("RGBA", (8, 8), (9, 9, 9, 5)), 64) is None


def archive(path: Path, files: dict[str, bytes]) -> packages.Package:
    """Pack a .tgz and describe it with its true hash."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return packages.Package("x", "1", packages.file_sha256(path))


def test_archives_are_checked_and_read(tmp_path: Path) -> None:
    package = archive(tmp_path / "x-1.tgz", {"a.json": b'{"n": 1}', "b.txt": b"no"})
    path = packages.fetch_package(package, tmp_path)
    assert packages.read_json_members(path, ["package/a.json"]) == {"package/a.json": {"n": 1}}
    with pytest.raises(packages.BuildError, match=r"c\.json is missing"):
        packages.read_json_members(path, ["package/c.json"])


def sprite(shade: int) -> drawing.Pixels:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[2:14, 2:14] = (shade, 60, 60, 255)
    return pixels


def test_parts_are_taken_up_again_only_if_they_fit(tmp_path: Path) -> None:
    path = build.part_path(tmp_path, styles.STYLES[0])
    assert build.read_part(path, ["1", "2"], 16) is None
    build.write_part(path, {"2": sprite(200)}, ["1", "2"])
    part = build.read_part(path, ["1", "2"], 16)
    assert part is not None and list(part) == ["2"]
    np.testing.assert_array_equal(part["2"], sprite(200))
    assert build.read_part(path, ["1"], 16) is None and build.read_part(path, ["1", "2"], 32) is None


def test_the_folder_opens_as_sprites(tmp_path: Path) -> None:
    found = concepts.choose_concepts([entry("red apple", "1"), entry("ghost", "2"), entry("nothing", "3")], WORDS)
    rows = [build.Row(found[0], style, sprite(220)) for style in styles.STYLES]
    rows.append(build.Row(found[1], styles.STYLES[0], sprite(255)))
    (tmp_path / build.PARTS).mkdir()
    build.write_folder(tmp_path, rows, found, ["red apple, fruit"], 16)
    opened = open_sprites(tmp_path)
    assert opened.pixels.shape == (12, 16, 16, 4) and list(opened.concepts) == ["red apple", "ghost"]
    assert opened.concepts["red apple"].sprites["retro"] == 10 and opened.concepts["ghost"].sprites == {"3d": 11}
    assert "red" in opened.concepts["red apple"].natural and opened.concepts["ghost"].labels == {"de": "ghost (de)"}
    assert [name for name, style in opened.styles.items() if style.ink] == ["bold line", "silhouette"]
    text = (tmp_path / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(style.set_name in text and style.licence in text for style in styles.STYLES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ATTRIBUTION.md", "index.json", "sprites.npy", "words.txt"]
    assert json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))["size"] == 16


def test_a_colour_in_which_something_of_that_name_is_drawn_is_its_own() -> None:
    names = [concepts.make_word(text, True, WORDS) for text in ("gem stone", "diamond")]
    assert build.said_colours(names, {"orange diamond", "blue stone", "red gem stone"}) == {"orange", "red"}


def test_wrong_package_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in packages.PACKAGES:
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
    assert [package.file_name for package in packages.PACKAGES] == [
        "iconify-json-2.2.535.tgz",
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "emojibase-data-17.0.0.tgz",
    ]
