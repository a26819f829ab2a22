"""A1111's prompt scheduling: executed vectors for 10 steps, the second pass, what is no schedule, endless nesting."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.text.schedule import idle, last_before, scheduled, timeline

AB = ["a", "b"] * 5
# Text -> (last step, text) for 10 steps; executed in AUTOMATIC1111's stable-diffusion-webui 1.10.
VECTORS = {
    "test": [(10, "test")],
    "a [b:0.5] c": [(5, "a  c"), (10, "a b c")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "a [b:3] c": [(3, "a  c"), (10, "a b c")],
    "a [b: 3 ] c": [(3, "a  c"), (10, "a b c")],
    "a [b::0.4] c": [(4, "a b c"), (10, "a  c")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "[a:b:0.3]": [(3, "a"), (10, "b")],
    "[a|b]": [(step + 1, text) for step, text in enumerate(AB)],
    "[a||c]": [(step + 1, ("a", "", "c")[step % 3]) for step in range(10)],
    "[a|(b:1.1)]": [(step + 1, ("a", "(b:1.1)")[step % 2]) for step in range(10)],
    "[a:[b:c:6]:3]": [(3, "a"), (6, "b"), (10, "c")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "x [y:1.5] z": [(10, "x  z")],
    "[a:b:11]": [(10, "a")],
    "[a:b:0]": [(10, "b")],
    "[a:b:1.0]": [(10, "a")],
    "[a:b:-3]": [(10, "b")],
    "bad [a:b": [(10, "bad [a:b")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "(a [b:c:0.5]:1.2)": [(5, "(a b:1.2)"), (10, "(a c:1.2)")],
    "x: [b:c:3]: y": [(3, "x: b: y"), (10, "x: c: y")],
    "[a:b:c]": [(10, "[a:b:c]")],
    "[a:b:c:3]": [(10, "[a:b:c:3]")],
    "[a:b|c:3]": [(10, "[a:b|c:3]")],
    "[x (a:b:c) y:3]": [(10, "[x (a:b:c) y:3]")],
    "[x ) y:3]": [(10, "[x ) y:3]")],
    r"[a\:b:c:3]": [(3, r"a\:b"), (10, "c")],
    r"[a\]:b:3]": [(3, r"a\]"), (10, "b")],
    "[a|b] [c:d:4]": [(s + 1, f"{t} {'c' if s < 4 else 'd'}") for s, t in enumerate(AB)],
}
# Where upstream's parser gives up on the whole prompt, we do not.
OURS = {
    "a | b [c:d:3]": [(3, "a | b c"), (10, "a | b d")],
    "[(a|b):c:3]": [(3, "(a|b)"), (10, "c")],
    "[a:b:3] \\": [(3, "a \\"), (10, "b \\")],
    "[a|a]": [(10, "a")],
}


@pytest.mark.parametrize(("text", "expected"), (VECTORS | OURS).items())
def test_vectors(text: str, expected: list[tuple[int, str]]) -> None:
    assert timeline(scheduled(text)[0], 10) == expected


@pytest.mark.parametrize(
    ("text", "second"),
    [
        ("x [y:1.5] z", [(5, "x  z"), (10, "x y z")]),
        ("x [y:15] z", [(5, "x  z"), (10, "x y z")]),
        ("[a:b:0.5]", [(10, "b")]),
        ("[a:b:5]", [(10, "b")]),
        ("[a:b:1.0]", [(10, "b")]),
        ("[a:b:10]", [(10, "b")]),
        ("[a:b:20]", [(10, "a")]),
        ("[a:b:2.0]", [(10, "a")]),
        ("[a|b]", [(step + 1, text) for step, text in enumerate(AB)]),
    ],
)
def test_the_second_pass_of_10_steps_behind_a_first_of_10(text: str, second: list[tuple[int, str]]) -> None:
    assert timeline(scheduled(text)[0], 10, 10) == second


def test_passes_may_differ_in_length() -> None:
    nodes, _ = scheduled("[a:b:23]")
    assert timeline(nodes, 20) == [(20, "a")]
    assert timeline(nodes, 8, 20) == [(3, "a"), (8, "b")]
    assert last_before("1.25", 8, 20) == 2


@pytest.mark.parametrize("when", ["1e999", "-1e999", "9" * 400, "0.0000001"])
def test_a_step_out_of_all_range_is_held_within_the_pass(when: str) -> None:
    assert 0 <= last_before(when, 10) <= 10


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "(", ")", "[", "]", ":", "|", "3", "0.5", "\\", " "]), max_size=25).map("".join))
def test_the_text_of_each_step_has_nothing_that_was_not_written(text: str) -> None:
    nodes, _ = scheduled(text)
    line = timeline(nodes, 10)
    assert line[-1][0] == 10
    assert all(before[1] != after[1] for before, after in pairwise(line))
    for _, one in line:
        letters = iter(text)
        assert all(letter in letters for letter in one), "letters of the text, in its order"


@pytest.mark.parametrize("text", ["[" * 100_000, "([" * 50_000 + ")", "[a:" * 30_000 + "b" + ":3]" * 30_000])
def test_nesting_does_not_recurse(text: str) -> None:
    nodes, _ = scheduled(text)
    assert timeline(nodes, 10)[-1][0] == 10
    assert idle(nodes, 10, None) == []


def test_a_schedule_that_changes_nothing_is_told() -> None:
    assert idle(scheduled("[a:b:0.5] [c:d:10]")[0], 10, None) == ["the schedule at 10 changes nothing within 10 steps"]
    assert idle(scheduled("[a:b:0]")[0], 10, None) == ["the schedule at 0 changes nothing within 10 steps"]
    assert idle(scheduled("[a:b:1.5] [c:d:0.5] [e:f:14]")[0], 10, 8) == []
    assert idle(scheduled("[a:b:2.5]")[0], 10, 8) == [
        "the schedule at 2.5 changes nothing within 10 steps and 8 of the second pass"
    ]


def test_what_only_looks_like_a_schedule_is_told() -> None:
    assert scheduled("[a:b:x] [c] [(d:1.2)] (e:1)")[1] == [
        "'[a:b:x]' is no schedule such as [from:to:0.5], and is read as text"
    ]
