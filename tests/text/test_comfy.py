"""ComfyUI's dialect: executed vectors, and its rules for brackets that do not match."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.errors import RequestError
from reverie.text.pieces import Prompt, Section
from reverie.text.prompt import parse, show


def read(text: str) -> Prompt:
    return parse(text, dialect="comfy", steps=10)


def pieces(text: str) -> list[tuple[str, float]]:
    (part,) = read(text).parts
    ((until, stage),) = part.stages
    (section,) = stage.sections
    assert isinstance(section, Section)
    assert (part.weight, until) == (1.0, 10)
    return [(piece.text, piece.weight) for piece in section.pieces]


# Executed in ComfyUI (comfy/sd1_clip.py, token_weights and the escapes around it).
VECTORS = {
    "(a (b:2) c:0.5)": [("a ", 0.5), ("b", 2.0), (" c", 0.5)],
    "((x:1.2))": [("x", 1.2)],
    "((red))": [("red", 1.1 * 1.1)],
    "(open": [("(open", 1)],
    "(foo)(bar)": [("foo", 1.1), ("bar", 1.1)],
    "((foo):1.1)": [("foo", 1.1 * 1.1)],
    "((foo:1.1))": [("foo", 1.1)],
    "(foo:0.0)": [("foo", 0.0)],
    "((foo:1.0):0.0)": [("foo", 1.0)],
    "foo ((((lol (cat:666) attack:100)))) baz": [
        ("foo ", 1.0), ("lol ", 100.0), ("cat", 666.0), (" attack", 100.0), (" baz", 1.0),
    ],
    "foo ((((lol (cat:666) attack):100))) baz": [
        ("foo ", 1.0), ("lol ", 100 * 1.1), ("cat", 666.0), (" attack", 100 * 1.1), (" baz", 1.0),
    ],
    "[a] BREAK {b|c} AND d:2": [("[a] BREAK {b|c} AND d:2", 1.0)],
    r"\(lit\) (a\)b:1.3) \x": [("(lit) ", 1.0), ("a)b", 1.3), (r" \x", 1.0)],
    "(:1.2)": [(":1.2", 1.1)],
    "(a:1.2 )(b: -.5)(c:1e-1)": [("a", 1.2), ("b", -0.5), ("c", 0.1)],
    "(a:nan)(b:x)": [("a:nan", 1.1), ("b:x", 1.1)],
    "(10:30:1.5)": [("10:30", 1.5)],
    "a ((b:1)) c": [("a ", 1.0), ("b", 1.0), (" c", 1.0)],
    # The closing bracket takes the next opening one with it.
    "a) (b) ((c))": [("a) (b) (", 1.0), ("c", 1.1), (")", 1.0)],
    "": [("", 1.0)],
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), VECTORS.items())
def test_vectors(text: str, expected: list[tuple[str, float]]) -> None:
    assert pieces(text) == expected


def read_again(text: str, weight: float = 1.0) -> list[tuple[str, float]]:
    """The same rules by recursion, for balanced text: cut into the outermost groups, read each."""
    found, depth, start = [], 0, 0
    for at, letter in enumerate(text + "\0"):
        if (letter == "(" and depth == 0) or letter == "\0":
            found += [(text[start:at], weight)] if at > start else []
            start = at
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == ")" and depth == 0:
            inner = text[start + 1 : at]
            before, colon, after = inner.rpartition(":")
            written = bool(before) and after.strip().lstrip("-").replace(".", "", 1).isdigit()
            found += read_again(before, float(after)) if colon and written else read_again(inner, weight * 1.1)
            start = at + 1
    return found


GROUPS = st.recursive(
    st.lists(st.sampled_from(["a", " b", ":", ":2", "1.5", "\\", "[", "|"]), max_size=4).map("".join),
    lambda inner: st.tuples(inner, inner, st.sampled_from(["", ":1.2", ": -3 ", ":0"]), inner).map(
        lambda t: f"{t[0]}({t[1].rstrip(chr(92))}{t[2]}){t[3]}"
    ),
    max_leaves=8,
).filter(lambda text: "\\(" not in text and "\\)" not in text)


@settings(deadline=None)
@given(GROUPS)
def test_any_balanced_text_reads_as_the_rules_say(text: str) -> None:
    assert pieces(text) == (read_again(text) or [("", 1.0)])


def test_brackets_that_do_not_match_are_told() -> None:
    assert read("(a) b").warnings == ()
    assert read("((a").warnings == ("2 opening brackets have no closing one and are read as text",)
    assert read("a) :)").warnings == ("2 closing brackets have no opening one and are read as text",)


def test_embeddings_are_named_and_their_text_stays() -> None:
    prompt = read("embedding:bad-hands, (embedding:Easy/neg:1.2) embedding:x<y xembedding:no embedding:bad-hands")
    assert prompt.embeddings == ("bad-hands", "Easy/neg", "x")
    assert pieces("(embedding:Easy/neg:1.2)") == [("embedding:Easy/neg", 1.2)]


def test_a_network_is_text_and_is_told() -> None:
    prompt = read("a <lora:x:1>")
    assert prompt.networks == ()
    assert prompt.warnings == ("'<lora:x:1>' is text in dialect comfy, which loads networks elsewhere",)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a (b (c)) d", "a (b :1.1)(c:1.2100000000000002) d"),
        ("a ((b:1)) c", "a (b:1) c"),
        ("(open \\", "\\(open \\"),
        ("a\\(\\((b:2)", "a\\(\\((b:2)"),
        ("(a\\:1)(b:2)", "(a\\:1)(b:2)"),
    ],
)
def test_the_canonical_form(text: str, printed: str) -> None:
    assert show(read(text)) == printed


def test_from_and_to_a1111() -> None:
    assert show(parse("a (b) c [d] (e (f:2):0.5)", steps=10), dialect="comfy") == (
        "a (b:1.1) c (d:0.9090909090909091) (e :0.5)f"
    )
    assert show(read("(a (b:2) c:0.5)"), dialect="a1111") == "(a :0.5)(b:2)( c:0.5)"


@pytest.mark.parametrize("text", ["a [b:5]", "a AND b", "a BREAK b", "a :2", "a <lora:x:1>"])
def test_what_this_dialect_cannot_say_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="dialect comfy has no words for schedules, AND, BREAK, blends and networks"):
        show(parse(text, steps=10), dialect="comfy")
