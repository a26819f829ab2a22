"""What holds for every dialect: any text is read, what is printed is read again, no text is slow."""

import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reverie.errors import RequestError
from reverie.text.pieces import LIMIT, MOST_WARNINGS, Blend, Piece, Prompt, Section, Stage, number
from reverie.text.prompt import DIALECTS, parse, show

NAMES = list(DIALECTS)
MARKS = [
    "a", "red cat ", "Dalí", "(", ")", "[", "]", "{", "}", ":", "|", "\\", '"', "'", "+", "-", ".", ",", " ", "\n",
    "0.5", ":1.2)", ":0.3]", ": 2 )", "(a:1.5)", "[a:b:0.5]", "[a|b]", " AND ", "AND", "BREAK", " BREAK ", "<lora:x:1>",
    "<", ">", "embedding:x", "++", "--", ")1.2", ".attend(", ".swap(b\n)", '"a", "b"', ").blend(1, 2)", ").and()",
    "withLora(a,1)", "é", "\u00a0", "\u2028", "1e3", "-1", "no_normalize", "_",
]  # fmt: skip
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(MARKS), max_size=16).map("".join))


def read(text: str, dialect: str, *, emphasis: bool = True, negative: bool = False) -> Prompt:
    return parse(text, dialect=dialect, steps=10, second_pass=4, emphasis=emphasis, negative=negative)


def pieces(prompt: Prompt) -> list[Piece]:
    """Everything that is tokenised."""
    stages = [stage for part in prompt.parts for _, stage in (*part.stages, *part.second)]
    entries = [entry for stage in stages for entry in stage.sections]
    sections = [s for entry in entries for s in (entry.sections if isinstance(entry, Blend) else (entry,))]
    return [piece for section in sections for piece in section.pieces]


@pytest.mark.parametrize("dialect", NAMES)
@settings(deadline=None)
@given(text=TEXTS, emphasis=st.booleans(), negative=st.booleans())
def test_any_text_is_read_and_printed_so_that_it_is_read_again(
    dialect: str, text: str, emphasis: bool, negative: bool
) -> None:
    prompt = read(text, dialect, emphasis=emphasis, negative=negative)
    printed = show(prompt)
    again = read(printed, dialect)
    assert again.parts == prompt.parts
    assert again.networks == prompt.networks
    assert show(again) == printed


@pytest.mark.parametrize("dialect", NAMES)
@settings(deadline=None)
@given(text=TEXTS)
def test_weights_are_finite_and_stages_cover_the_steps(dialect: str, text: str) -> None:
    prompt = read(text, dialect)
    assert all(abs(piece.weight) <= LIMIT for piece in pieces(prompt))
    for part in prompt.parts:
        for steps, stages in ((10, part.stages), (4, part.second)):
            ends = [until for until, _ in stages]
            assert ends == sorted(set(ends))
            assert ends[0] >= 1
            assert ends[-1] == steps
    assert all("\n" not in warning and len(warning) < 300 for warning in prompt.warnings)


@pytest.mark.parametrize(
    ("alias", "name"),
    [("A1111", "a1111"), ("Forge", "a1111"), ("ComfyUI", "comfy"), ("InvokeAI", "compel"), ("diffusers", "plain")],
)
def test_dialects_have_the_names_of_their_programs(alias: str, name: str) -> None:
    assert parse("a", dialect=alias, steps=1).dialect == name


def test_an_unknown_dialect_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown prompt dialect 'confy'; did you mean 'comfy'"):
        parse("a", dialect="confy", steps=1)


@pytest.mark.parametrize(("steps", "second"), [(0, None), (-1, None), (1, 0)])
def test_a_pass_has_a_step(steps: int, second: int | None) -> None:
    with pytest.raises(RequestError, match="at least 1 step"):
        parse("a", steps=steps, second_pass=second)


@pytest.mark.parametrize("dialect", NAMES)
@settings(deadline=None)
@given(words=st.lists(st.sampled_from(["red", "cat,", "Dalí", "2 dogs", "it's"]), max_size=8))
def test_all_dialects_agree_on_plain_words(dialect: str, words: list[str]) -> None:
    text = " ".join(words)
    prompt = read(text, dialect)
    assert prompt.parts[0].stages == ((10, Stage((Section((Piece(text),)),))),)
    assert (show(prompt), prompt.warnings) == (text, ())


def test_plain_is_the_text_as_it_is() -> None:
    text = " (a:1.2) [b|c] AND {d} <lora:x:1> :5 "
    prompt = parse(text, dialect="plain", steps=10)
    assert pieces(prompt) == [Piece(text)]
    assert (show(prompt), prompt.networks, prompt.warnings) == (text, (), ())


@pytest.mark.parametrize("text", ["(a:1.2)", "a AND b", "[a:b:3]", "a BREAK b", "a <lora:x:1>"])
def test_plain_cannot_say_more(text: str) -> None:
    with pytest.raises(RequestError, match="dialect plain has no words for anything but text"):
        show(parse(text, steps=10), dialect="plain")


WEIGHTED = st.lists(st.tuples(st.sampled_from(["red ", " cat", "a (b) \\ c", "x+", '"', "[", "5"]), st.floats(-3, 3)))


@settings(deadline=None)
@given(WEIGHTED, st.sampled_from(["a1111", "comfy", "compel"]), st.sampled_from(["a1111", "comfy", "compel"]))
def test_conversion_keeps_texts_and_weights(parts: list[tuple[str, float]], source: str, target: str) -> None:
    # Neighbours of one weight are one piece, which every dialect has words for.
    weights = [weight for _, weight in parts]
    assume(all(a != b for a, b in pairwise(weights)))
    assume("compel" not in {source, target} or min(weights, default=0) >= 0)
    stage = Stage((Section(tuple(Piece(*part) for part in parts) or (Piece(""),)),))
    prompt = read("", source)
    prompt = replace(
        prompt, parts=tuple(replace(part, stages=((10, stage),), second=((4, stage),)) for part in prompt.parts)
    )
    there = read(show(prompt, dialect=target), target)
    assert pieces(there) == pieces(prompt)
    assert read(show(there, dialect=source), source).parts == prompt.parts


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_printed_without_exponent_and_read_back(value: float) -> None:
    assert float(number(value)) == value
    assert "e" not in number(value).lower()


def test_strict_refuses_what_is_not_clear() -> None:
    with pytest.raises(RequestError, match="the prompt is not clear: 1 opening bracket has no closing one"):
        parse("a (b", steps=1, strict=True)
    assert parse("a (b)", steps=1, strict=True).warnings == ()


def test_warnings_are_few_and_short() -> None:
    warnings = parse(
        "[a:b:x" + "y" * 500 + "]" + " (a:900)" * 50 + "".join(f"[{n}:x]" for n in range(50)), steps=1
    ).warnings
    assert len(warnings) == MOST_WARNINGS + 1
    assert warnings[-1] == "and 32 more warnings of this kind"
    assert all(len(warning) < 200 for warning in warnings)


HALF = 125_000
LONG = {
    "words": "a red cat, (very:1.2) nice " * (HALF // 13),
    "openings": "(" * 2 * HALF,
    "square openings": "[" * HALF + "]",
    "nested": "(" * HALF + ")" * HALF,
    "nested schedules": "[a:" * (HALF // 4) + ":3]" * (HALF // 4),
    "alternating": "([" * HALF,
    "space": " " * 2 * HALF + "BREAK" + " " * 2 * HALF,
    "numbers": "[a:" + "1" * 2 * HALF,
    "weights": "(a:" + " " * HALF + "1" * HALF + "x)",
    "tags": "<a:" * (HALF // 2),
    "backslashes": "\\" * 2 * HALF,
    "quotes": '"(' * HALF,
    "signs": "+" * 2 * HALF,
}


@pytest.mark.parametrize("dialect", NAMES)
@pytest.mark.parametrize("text", LONG.values(), ids=LONG.keys())
def test_no_text_takes_more_than_linear_time(dialect: str, text: str) -> None:
    # A quarter of a million characters take well under 2 s; time in proportion to their square would be hours.
    start = time.process_time()
    read(text, dialect)
    assert time.process_time() - start < 10
