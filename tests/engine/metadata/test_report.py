"""What is said of things that cannot be carried."""

from typing import Any

import pytest

from reverie.engine.metadata.keys import Keys
from reverie.engine.metadata.report import MOST_NOTES, SHOWN, Found, Notes, parse_object, settle, shown
from reverie.engine.request import Request
from reverie.errors import RequestError


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("a\nb\t c", "a b c"), ("\x1b[31mred\u202e", "[31mred"), ({"a": ["é", 1]}, '{"a": ["é", 1]}'), (None, "null"),
        ("\ud800", ""), (object(), "a object"), (0.5, "0.5"),
    ],
)  # fmt: skip
def test_values_in_one_line(value: object, line: str) -> None:
    assert shown(value) == line


def test_long_values_are_cut() -> None:
    assert shown("x" * 1000) == "x" * (SHOWN - 3) + "..."
    assert len(shown(["x" * 1000])) == SHOWN


def test_a_thing_is_noted_once_and_not_too_many() -> None:
    notes = Notes()
    for i in range(MOST_NOTES + 50):
        notes.add("key", i // 2, "why")
    assert notes.lines()[:2] == ("key: 0 (why)", "key: 1 (why)")
    assert len(notes.lines()) == len(set(notes.lines())) == (MOST_NOTES + 50) // 2
    for i in range(1000):
        notes.add("other", i, "why")
    assert len(notes.lines()) == MOST_NOTES + 1
    assert notes.lines()[-1].endswith(" more")


@pytest.mark.parametrize(
    ("fields", "kept", "noted"),
    [
        ({"steps": "20", "seed": 7}, {"steps": 20, "seed": 7}, []),
        ({"steps": "many", "seed": -1, "prompt": "a"}, {"prompt": "a"}, ["steps", "seed"]),
        ({"hires": {"scale": 99, "steps": 5}}, {"hires": {"steps": 5}}, ["hires.scale"]),
        ({"hires": {"magic": 1}}, {"hires": {}}, ["hires.magic"]), ({"hires": 3}, {}, ["hires"]),
        ({"magic": 1, "width": 64}, {"width": 64}, ["magic"]), ({"guides": [{"x": 1}]}, {}, ["guides"]),
        ({"eta": float("nan"), "sampler_options": {"s_tmax": float("inf")}}, {}, ["eta", "sampler_options"]),
        ({"prompt": None}, {}, ["prompt"]), ({"prompt": "a\ud800"}, {"prompt": "a\ufffd"}, []),
    ],
)  # fmt: skip
def test_fields_that_cannot_be_are_left_out(fields: dict[str, Any], kept: dict[str, Any], noted: list[str]) -> None:
    notes = Notes()
    request = settle(fields, notes)
    assert request.model_dump(exclude_unset=True) == kept
    assert sorted(note.partition(":")[0] for note in notes.lines()) == sorted(noted)


def test_the_input_is_left_alone() -> None:
    fields = {"hires": {"scale": 99}}
    settle(fields, Notes())
    assert fields == {"hires": {"scale": 99}}


def test_fields_that_the_picture_speaks_of() -> None:
    found = Found("ComfyUI", Request(prompt="a", steps=5), {}, (), "")
    assert found.fields == {"prompt": "a", "steps": 5}


@pytest.mark.parametrize(("text", "said"), [("", "is not JSON"), ("[1]", r"is \[1\]; expected a JSON object")])
def test_what_is_no_object(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=f"^the thing {said}"):
        parse_object(text, "the thing")


def test_keys_that_are_left_are_noted_if_they_change_something() -> None:
    keys = Keys({"a": 1, "b": None, "c": "None", "d": [], "e": 0, "f": False, "g": "x", "h": 2, "seed": 5, "name": 3})
    keys.plain({"seed": "seed", "absent": "steps"})
    assert keys.take("absent", "h") == 2
    assert keys.text("name") == ""
    found = keys.found("P", "text", why={"g": "because"}, silent=frozenset({"a"}))
    assert found.notes == ("g: x (because)",)
    assert found.request == Request(seed=5)
