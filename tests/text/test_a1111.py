"""The A1111 dialect as a whole: AND and its weights, networks, schedules and emphasis together."""

import pytest

from reverie.errors import RequestError
from reverie.text.a1111 import weighted
from reverie.text.pieces import Network, Part, Piece, Prompt, Section, Stage
from reverie.text.prompt import parse, show


def read(text: str, *, emphasis: bool = True, negative: bool = False) -> Prompt:
    return parse(text, steps=10, emphasis=emphasis, negative=negative)


def texts(part: Part) -> list[tuple[int, list[tuple[str, float]]]]:
    """The stages of a part that has no BREAK."""
    found = []
    for until, stage in part.stages:
        (section,) = stage.sections
        assert isinstance(section, Section)
        found.append((until, [(piece.text, piece.weight) for piece in section.pieces]))
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat :1.2 ", ("a cat", 1.2)),
        ("x:-0.5", ("x", -0.5)),
        ("x:+2.", ("x", 2.0)),
        ("x : .5", ("x", 0.5)),
        ("x", ("x", 1.0)),
        ("x:", ("x:", 1.0)),
        ("x:1.2.3", ("x:1.2.3", 1.0)),
        ("x:1e3", ("x:1e3", 1.0)),
        ("(x:1.2)", ("(x:1.2)", 1.0)),
        (r"x\:2", (r"x\:2", 1.0)),
        (r"x\\:2", (r"x\\", 2.0)),
        ("", ("", 1.0)),
        (":3", ("", 3.0)),
    ],
)
def test_the_weight_of_a_part(text: str, expected: tuple[str, float]) -> None:
    assert weighted(text) == expected


def test_and_composes_parts_with_weights_of_either_sign() -> None:
    first, second, third = read("a (cat:1.2) AND [b:c:4] :-0.5 AND ANDes :2").parts
    assert (first.weight, texts(first)) == (1.0, [(10, [("a ", 1.0), ("cat", 1.2)])])
    assert (second.weight, texts(second)) == (-0.5, [(4, [("b", 1.0)]), (10, [("c", 1.0)])])
    assert (third.weight, texts(third)) == (2.0, [(10, [("ANDes", 1.0)])])


def test_and_splits_before_everything_else() -> None:
    assert [texts(part) for part in read("(a AND b:1.3)").parts] == [
        [(10, [("a", 1.1)])],
        [(10, [("b:1.3)", 1.0)])],
    ]


def test_a_lone_prompt_may_have_a_weight_and_is_told_of_it() -> None:
    prompt = read("photo at 10:30")
    assert prompt.parts[0].weight == 30
    assert prompt.warnings == ("the whole prompt has weight 30, for it ends in `:30`; write `\\:` for a colon",)
    escaped = read(r"photo at 10\:30")
    assert (escaped.parts[0].weight, texts(escaped.parts[0])) == (1.0, [(10, [("photo at 10:30", 1.0)])])


def test_a_negative_prompt_has_a_weight_only_with_and() -> None:
    assert texts(read("bad hands:1.2", negative=True).parts[0]) == [(10, [("bad hands:1.2", 1.0)])]
    assert [part.weight for part in read("a:1.2 AND b:0.5", negative=True).parts] == [1.2, 0.5]


def test_without_emphasis_marks_are_text_but_schedules_are_not() -> None:
    prompt = read("(a:1.2) BREAK [b:c:5] <lora:x:1>", emphasis=False)
    assert texts(prompt.parts[0]) == [(5, [("(a:1.2) BREAK b", 1.0)]), (10, [("(a:1.2) BREAK c", 1.0)])]
    assert prompt.networks == (Network("lora", "x"),)


def test_networks_are_taken_from_everywhere() -> None:
    prompt = read("a<lora:x:0.5> [<lora:y:2>b:c:3] AND <hypernet:z:0.3>d")
    assert prompt.networks == (
        Network("lora", "x", 0.5, 0.5),
        Network("lora", "y", 2.0, 2.0),
        Network("hypernet", "z", 0.3, 0.3),
    )
    assert [texts(part)[-1][1] for part in prompt.parts] == [[("a c", 1.0)], [("d", 1.0)]]


def test_comments_are_text() -> None:
    assert texts(read("# not a comment\na cat").parts[0]) == [(10, [("# not a comment\na cat", 1.0)])]


def test_stages_of_both_passes() -> None:
    (part,) = parse("a [b:c:0.5] [d:1.25]", steps=10, second_pass=8).parts
    assert [(until, part.at(until).sections[0]) for until, _ in part.stages] == [
        (5, Section((Piece("a b "),))),
        (10, Section((Piece("a c "),))),
    ]
    assert part.at(1, second=True) == part.at(2, second=True) == part.at(10)
    assert part.at(3, second=True) == part.at(8, second=True) == Stage((Section((Piece("a c d"),)),))
    assert part.at(99) == part.at(10)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a  (cat), [b]", "a  (cat:1.1), (b:0.9090909090909091)"),
        ("(a BREAK b:1.2)", "(a:1.2) BREAK (b:1.2)"),
        ("x [y:z:5] w", "[x y w:x z w:5]"),
        ("[a|b:c:4]", "(a|b:c:4:0.9090909090909091)"),
        ("[(a\\:b:2):c:4]", r"[(a\:b:2):c:4]"),
        ("a AND b :-1 <lora:x:1:0.5>", "a AND b :-1 <lora:x:1:0.5>"),
        (r"a\:5", r"a\:5"),
        ("BREAK)", r" BREAK \)"),
        (r"A(ND:1) B(REAK:1) <lora(:x>:1)", r"A\ND B\REAK <\lora:x>"),
    ],
)
def test_the_canonical_form(text: str, printed: str) -> None:
    assert show(read(text)) == printed
    assert read(printed).parts == read(text).parts


def test_the_canonical_form_holds_both_passes() -> None:
    prompt = parse("[a:b:5] [c:13]", steps=10, second_pass=8)
    assert show(prompt) == "[a :[b :b c:13]:5]"
    assert parse(show(prompt), steps=10, second_pass=8) == prompt


def test_what_this_dialect_cannot_say_is_refused() -> None:
    for text in ('("a", "b").blend(1, 1)', '("a", "b").and(1, 2)'):
        with pytest.raises(RequestError, match=r"dialect a1111 has no words for \.blend"):
            show(parse(text, dialect="compel", steps=1), dialect="a1111")
