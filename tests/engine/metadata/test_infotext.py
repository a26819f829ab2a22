"""The grammar of the `parameters` text."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie.engine.metadata import infotext

# The pattern by which the web UI finds settings; ours must find the same in linear time.
PATTERN = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
SETTINGS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Size: 512x768"


def test_layout() -> None:
    settings = {"Steps": 20, "CFG scale": 7.0, "Nothing": None, "Face restoration": "Face restoration", "Tiling": True}
    text = infotext.join("a cat\nasleep", "rain\nfog", settings)
    assert text == (
        "a cat\nasleep\nNegative prompt: rain\nfog\nSteps: 20, CFG scale: 7, Face restoration, Tiling: True"
    )


def test_no_line_for_an_empty_negative_prompt() -> None:
    assert infotext.join("a cat", "", {"Steps": 20}) == "a cat\nSteps: 20"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("DPM++ 2M", "DPM++ 2M"), ("a, b", '"a, b"'), ("a: b", '"a: b"'), ("a\nb", '"a\\nb"'),
        ("größer, 猫", '"größer, 猫"'),
        (7.0, "7"), (7.5, "7.5"), (0.1, "0.1"), (1e-7, "1e-07"), (True, "True"), (1 / 3, repr(1 / 3)),
        ("", '""'), (" a", '" a"'), ('"a"', r'"\"a\""'), ("[1]", '"[1]"'), ("{a}", '"{a}"'),
    ],
)  # fmt: skip
def test_values(value: object, written: str) -> None:
    assert infotext.quoted(value) == written
    read = dict(infotext.entries(f"Key: {written}, Other: 1"))
    assert read == {"Key": value if isinstance(value, str) else written, "Other": "1"}


def test_prompts_and_settings() -> None:
    text = f"\n  a cat  \n\n asleep\nNegative prompt:  rain \n fog\n{SETTINGS}\n"
    assert infotext.parse(text) == {
        "Prompt": "a cat\n\nasleep", "Negative prompt": "rain\nfog", "Steps": "20", "Sampler": "Euler a",
        "CFG scale": "7", "Size-1": "512", "Size-2": "768",
    }  # fmt: skip


@pytest.mark.parametrize("last", ["Steps: 20, Sampler: Euler", "a: b, c: d, e: f", "", "the end"])
def test_a_last_line_with_fewer_than_three_settings_is_part_of_the_prompt(last: str) -> None:
    assert infotext.parse(f"a cat\n{last}") == {"Prompt": f"a cat\n{last}".strip(), "Negative prompt": ""}


def test_settings_alone() -> None:
    assert infotext.parse(SETTINGS)["Prompt"] == ""
    assert infotext.has_settings(f"words\n{SETTINGS}\n")
    assert not infotext.has_settings("words: more, words: less")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('ab: "x, y", cd: 2', {"ab": "x, y", "cd": "2"}),
        (r'ab: "x \"y\", z", cd: 2', {"ab": 'x "y", z', "cd": "2"}),
        (r'ab: "bad \q", cd: 2', {"ab": r'"bad \q"', "cd": "2"}),
        ('ab: "open, cd: 2', {"ab": '"open', "cd": "2"}),
        ('ab: "x" y, cd: 2', {"ab": '"x" y', "cd": "2"}),
        ("Seed resize from: 512x512", {"Seed resize from": "512x512"}),
        ("a-b/c d : 1, é1: 2", {"a-b/c d": "1", "é1": "2"}),
        ("flag, ab: 1, x: 2, : 3", {"ab": "1"}),
        ("ab: 1, ab: 2", {"ab": "2"}),
        ("Civitai resources: [{\"name\": \"a, b: c\", \"w\": 1}], Civitai metadata: {}, ab: 1",
         {"Civitai resources": '[{"name": "a, b: c", "w": 1}]', "Civitai metadata": "{}", "ab": "1"}),
        ("ab: [not json, cd: 2", {"ab": "[not json", "cd": "2"}),
        ("ab: {a|b} words, cd: 2", {"ab": "{a|b} words", "cd": "2"}),
    ],
)  # fmt: skip
def test_entries(line: str, found: dict[str, str]) -> None:
    assert dict(infotext.entries(line)) == found


letters = st.text(st.sampled_from(list('ab1é-/: ,"\\\t')), max_size=30)


@given(letters)
def test_entries_are_those_of_the_pattern(line: str) -> None:
    expected = [(key.strip(), infotext._unquoted(value.strip())) for key, value in PATTERN.findall(line)]
    assert list(infotext.entries(line)) == expected


@given(st.text(max_size=200))
def test_any_value_is_read_back(value: str) -> None:
    assert dict(infotext.entries(f"Key: {infotext.quoted(value)}, Other: 1"))["Key"] == value


@given(st.lists(letters, max_size=4).map("\n".join), st.lists(letters, max_size=4).map("\n".join))
def test_what_was_parsed_is_parsed_again(prompt: str, negative: str) -> None:
    once = infotext.parse(infotext.join(prompt, negative, {"Steps": 20, "Sampler": "Euler", "Seed": 1}))
    again = infotext.join(once.pop("Prompt"), once.pop("Negative prompt"), once)
    assert infotext.join(*_split(infotext.parse(again))) == again


def _split(parsed: dict[str, str]) -> tuple[str, str, dict[str, str]]:
    return parsed.pop("Prompt"), parsed.pop("Negative prompt"), parsed


def test_the_defaults_are_strings_of_known_keys() -> None:
    assert infotext.DEFAULTS["RNG"] == "GPU"
    assert infotext.DEFAULTS["Hires sampler"] == "Use same sampler"
    assert json.loads(json.dumps(infotext.DEFAULTS)) == infotext.DEFAULTS
