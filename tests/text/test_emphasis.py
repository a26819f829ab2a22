"""A1111's emphasis: executed vectors, and an independent reading of the same rules for any text."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.text.emphasis import emphasised, show_sections
from reverie.text.pieces import LIMIT, Piece, Section

DOWN = 1 / 1.1
# Text -> sections of (text, weight); executed in AUTOMATIC1111's stable-diffusion-webui 1.10.
VECTORS = {
    "a (red) cat": [[("a ", 1), ("red", 1.1), (" cat", 1)]],
    "((red)) cat": [[("red", 1.1 * 1.1), (" cat", 1)]],
    "[dull] cat": [[("dull", DOWN), (" cat", 1)]],
    "(a (b:2) c:0.5)": [[("a ", 0.5), ("b", 1.0), (" c", 0.5)]],
    "[(x:1.2)]": [[("x", 1.2 * DOWN)]],
    "(open": [[("open", 1.1)]],
    "close) x": [[("close) x", 1)]],
    r"\(lit\) (w:1.3)": [[("(lit) ", 1), ("w", 1.3)]],
    "a BREAK b": [[("a", 1)], [("b", 1)]],
    "x:1.5": [[("x:1.5", 1)]],
    "(x:)": [[("x:", 1.1)]],
    "(x: 1.2)": [[("x", 1.2)]],
    "(x:1.2 )": [[("x", 1.2)]],
    "(a:-1)": [[("a", -1)]],
    "": [[("", 1)]],
    r"a\\b": [[("a\\b", 1)]],
    "(unnecessary)(parens)": [[("unnecessaryparens", 1.1)]],
    r"\(literal\]": [[("(literal]", 1)]],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        [
            ("a ", 1), ("house", 1.3 * 1.1 * 1.1), (" ", 1.1), ("on", DOWN * 1.1), (" a ", 1.1), ("hill", 0.5 * 1.1),
            (", sun, ", 1.1), ("sky", 1.1 * 1.1 * 1.1 * 1.1), (".", 1.1),
        ]
    ],
    # Round and square brackets are matched apart, so that they may overlap.
    "(a [b) c]": [[("a ", 1.1), ("b", 1.1 * DOWN), (" c", DOWN)]],
    # A backslash before anything else vanishes.
    r"a\b \"": [[('ab "', 1)]],
    "a\\": [[("a", 1)]],
}  # fmt: skip
# Ours: BREAK breaks whatever it stands in. Upstream such a BREAK is text.
OURS = {
    "(a BREAK b:1.2)": [[("a", 1.2)], [("b", 1.2)]],
    "a BREAK": [[("a", 1)]],
    "BREAK a": [[("", 1)], [("a", 1)]],
    "a BREAK BREAK b": [[("a", 1)], [("", 1)], [("b", 1)]],
    "BREAKS aBREAK": [[("BREAKS aBREAK", 1)]],
    r"B\REAK": [[("BREAK", 1)]],
    "a (b:9) BREAK (b:9)c": [[("a ", 1), ("b", 9)], [("b", 9), ("c", 1)]],
}


def plain(sections: tuple[Section, ...]) -> list[list[tuple[str, float]]]:
    return [[(piece.text, piece.weight) for piece in section.pieces] for section in sections]


@pytest.mark.parametrize(("text", "expected"), (VECTORS | OURS).items())
def test_vectors(text: str, expected: list[list[tuple[str, float]]]) -> None:
    # To the last bit: equal neighbours must merge as they do upstream.
    assert plain(emphasised(text)[0]) == expected


MARKS = st.sampled_from(["a", "b c", "(", ")", "[", "]", ":1.2)", ": .5 )", ":", "\\", "\\(", " BREAK ", "x BREAKy"])


def read_again(text: str) -> list[list[tuple[str, float]]]:
    """The same rules, read character by character: each bracket multiplies what stands since its counterpart."""
    letters: list[list[str | float | None]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        for letter in letters[start:]:
            letter[1] = float(letter[1] or 0) * factor

    at = 0
    while at < len(text):
        rest = text[at:]
        before, colon, _ = rest.partition(")")
        if rest[0] == "\\":
            escaped = rest[1:2] in {"(", ")", "[", "]", "\\"} and rest[1:2] != ""
            letters += [[rest[1], 1.0]] if escaped else []
            at += 1 + escaped
        elif rest[0] in "([":
            opened[rest[0]].append(len(letters))
            at += 1
        elif rest[0] == ":" and colon and number(before[1:]) is not None and opened["("]:
            multiply(opened["("].pop(), number(before[1:]) or 0.0)
            at += len(before) + 1
        elif rest[0] in ")]" and opened["(" if rest[0] == ")" else "["]:
            multiply(opened["(" if rest[0] == ")" else "["].pop(), 1.1 if rest[0] == ")" else DOWN)
            at += 1
        else:
            letters.append([rest[0], 1.0])
            at += 1
    for start in opened["("]:
        multiply(start, 1.1)
    for start in opened["["]:
        multiply(start, DOWN)
    runs: list[tuple[str, float]] = []
    for letter, weight in letters:
        if runs and runs[-1][1] == weight:
            runs[-1] = (runs[-1][0] + str(letter), runs[-1][1])
        else:
            runs.append((str(letter), float(weight or 0)))
    return [runs or [("", 1.0)]]


def number(text: str) -> float | None:
    text = text.strip(" ")
    return float(text) if text.strip("+-").replace(".", "", 1).isdigit() else None


@settings(deadline=None)
@given(st.lists(MARKS.filter(lambda mark: "BREAK" not in mark), max_size=20).map("".join))
def test_any_text_reads_as_the_rules_say(text: str) -> None:
    assert plain(emphasised(text)[0]) == read_again(text)


@settings(deadline=None)
@given(st.lists(MARKS, max_size=20).map("".join), st.booleans())
def test_what_is_printed_is_read_again(text: str, nested: bool) -> None:
    sections, _ = emphasised(text)
    assert emphasised(show_sections(sections, nested=nested))[0] == sections


def test_deep_nesting_keeps_its_weights() -> None:
    for depth in (31, 32, 33, 60):
        ((piece,),) = plain(emphasised("(" * depth + "a" + ")" * depth)[0])
        # Deeper than 32 the factors are multiplied in another order: a few units in the last place.
        assert piece[1] == pytest.approx(1.1**depth, rel=1e-13)


def test_weights_stay_finite() -> None:
    ((up,),) = plain(emphasised("(" * 100_000 + "a")[0])
    ((down,),) = plain(emphasised("[" * 100_000 + "a")[0])
    ((long,),) = plain(emphasised(f"(a:{'9' * 500})")[0])
    assert up[1] == long[1] == LIMIT
    assert 0 <= down[1] < 1e-90
    nothing = "(" * 50_000 + "a" + ":0)" + ")" * 49_999
    assert math.copysign(1, emphasised(nothing)[0][0].pieces[0].weight) == 1
    assert emphasised(nothing)[0][0].pieces == (Piece("a", 0.0),)


@pytest.mark.parametrize(
    ("text", "warnings"),
    [
        ("(a) [b]", []),
        (r"\( \] a", []),
        ("(a", ["1 opening bracket has no closing one: the emphasis reaches the end of the text"]),
        ("((a [b", ["3 opening brackets have no closing one: the emphasis reaches the end of the text"]),
        ("a) b]", ["2 closing brackets have no opening one and are read as text"]),
        ("a:1.2)", ["1 closing bracket has no opening one and is read as text"]),
    ],
)
def test_unbalanced_brackets_are_told(text: str, warnings: list[str]) -> None:
    assert emphasised(text)[1] == warnings
