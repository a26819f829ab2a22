"""Compel's dialect: what its documentation says and its parser does, executed with compel 2.5."""

import pytest

from reverie.errors import RequestError
from reverie.text.pieces import Blend, Network, Prompt, Section, Stage
from reverie.text.prompt import parse, show

UP, DOWN = 1.1, 0.9
Pairs = list[tuple[str, float]]


def read(text: str) -> Prompt:
    return parse(text, dialect="compel", steps=10)


def stage(text: str) -> Stage:
    (part,) = read(text).parts
    ((until, found),) = part.stages
    assert (part.weight, until) == (1.0, 10)
    return found


def pairs(section: Section | Blend) -> Pairs:
    assert isinstance(section, Section)
    return [(piece.text, piece.weight) for piece in section.pieces]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [("", 1)]),
        ("fire, flames , fire", [("fire, flames , fire", 1)]),
        ("cat hot-dog eating", [("cat hot-dog eating", 1)]),
        ("fire (flames)", [("fire flames", 1)]),
        ("hamburger ((kaiser roll))", [("hamburger kaiser roll", 1)]),
        ("(flames)0.5", [("flames", 0.5)]),
        ("(flames).attend(0.5)", [("flames", 0.5)]),
        ("flames.attend(0.5)", [("flames", 0.5)]),
        ('"flames".attend(++)', [("flames", UP**2)]),
        ("fire (hot flames)0.5", [("fire ", 1), ("hot flames", 0.5)]),
        ("flames+", [("flames", UP)]),
        ("flames-", [("flames", DOWN)]),
        ('"pretty flames"+', [("pretty flames", UP)]),
        ("(flowers)--- flames+++", [("flowers", DOWN**3), (" ", 1), ("flames", UP**3)]),
        ("(pretty flowers)+, the flames", [("pretty flowers", UP), (", the flames", 1)]),
        ("(pretty, tall (flowers)+)++", [("pretty, tall ", UP**2), ("flowers", UP**2 * UP)]),
        ("fire (flames (trees)1.5)2.0", [("fire ", 1), ("flames ", 2.0), ("trees", 3.0)]),
        ("a man (picking apricots+)++", [("a man ", 1), ("picking ", UP**2), ("apricots", UP**2 * UP)]),
        # No operators: a sign within a word or alone, a number that stands apart.
        ("a +b c- d", [("a +b ", 1), ("c", DOWN), (" d", 1)]),
        ("a + b - c", [("a + b - c", 1)]),
        ("x (a) 1.5", [("x a 1.5", 1)]),
        # What does not match is text; so are brackets and quotes in the middle of a word.
        ("a badly (formed +test prompt", [("a badly (formed +test prompt", 1)]),
        ("(a (ba)dly (f)ormed +test", [("(a ba dly f ormed +test", 1)]),
        ('6" photo(2) dog\'s', [('6" photo(2) dog\'s', 1)]),
        # Escapes.
        (r"\(a\) b\+ c\- \"d\" \\", [("(a) b+ c- \"d\" \\", 1)]),
        (r"(a\)b)+", [("a)b", UP)]),
        (r"back\slash", [(r"back\slash", 1)]),
    ],
)  # fmt: skip
def test_weights(text: str, expected: Pairs) -> None:
    found = pairs(stage(text).sections[0])
    assert [one for one, _ in found] == [one for one, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-15)


@pytest.mark.parametrize(
    ("text", "expected", "weights", "normalise"),
    [
        ('("fire", "flames").blend()', [[("fire", 1)], [("flames", 1)]], (1, 1), True),
        ("(mountain, man).blend(1, 2)", [[("mountain", 1)], [("man", 1)]], (1, 2), True),
        ("((mountain), (tall man)) .blend (1,2)", [[("mountain", 1)], [("tall man", 1)]], (1, 2), True),
        ('("fire", "fire (hot)++").blend(0.7, 0.3)', [[("fire", 1)], [("fire ", 1), ("hot", 1.21)]], (0.7, 0.3), True),
        ('("a, b", "c").blend(1,-0.5,no_normalize)', [[("a, b", 1)], [("c", 1)]], (1, -0.5), False),
        ('("fire", "").blend(0.7, 1)', [[("fire", 1)], [("", 1)]], (0.7, 1), True),
        ('("fire").blend(0.7)', [[("fire", 1)]], (0.7,), True),
        (r'("say \"hi\"", "b").blend(1, 1)', [[('say "hi"', 1)], [("b", 1)]], (1, 1), True),
    ],
)
def test_blend(text: str, expected: list[Pairs], weights: tuple[float, ...], normalise: bool) -> None:
    (blend,) = stage(text).sections
    assert isinstance(blend, Blend)
    assert [[(t, round(w, 9)) for t, w in pairs(section)] for section in blend.sections] == expected
    assert (blend.weights, blend.normalise) == (weights, normalise)
    assert read(text).warnings == ()


@pytest.mark.parametrize("name", ["and", "add"])
def test_conjunction(name: str) -> None:
    found = stage(f'("(fire)2.0", "flames- (x, y)").{name}(2, 0.5)')
    assert [pairs(section) for section in found.sections] == [[("fire", 2.0)], [("flames", DOWN), (" x, y", 1)]]
    assert found.weights == (2, 0.5)


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ('("a", "b").blend(1)', "2 prompts have 1 weights; the rest have weight 1, those beyond are not used"),
        ('("a", "b").and(1, 2, 3)', "2 prompts have 3 weights; the rest have weight 1, those beyond are not used"),
        ('("a", "b").blend(1, x)', "'x' is no weight, and not used"),
        ('("a", "b").blend(1, -1)', "the weights of .blend() have the sum 0 and are not normalised"),
        ('x ("a", "b").blend(1, 1)', "').blend('…) is text here: it acts only on the prompt as a whole"),
        ("a cat.swap(dog)", "'.swap(dog)' is not used: prompts are not swapped within a picture"),
        ("a (cat", "an opening bracket has no closing one and is read as text"),
        ("(cat)9", "the weight 9 of 'cat' is far outside the useful range of about 0 to 2"),
    ],
)
def test_what_cannot_be_meant_is_told(text: str, warning: str) -> None:
    assert warning in read(text).warnings


def test_a_swap_keeps_what_is_there() -> None:
    assert pairs(stage("a cat.swap(dog) eats").sections[0]) == [("a cat eats", 1)]


@pytest.mark.parametrize("text", ["().blend()", "(a, b)).and()", '("a, "b").and()', "(a,).and()", ".and()", "a).and()"])
def test_operators_that_do_not_fit_are_text(text: str) -> None:
    (section,) = stage(text).sections
    assert isinstance(section, Section)


def test_networks() -> None:
    prompt = read("a cat withLora(some-name, 0.5) useLora(other)")
    assert prompt.networks == (Network("lora", "some-name", 0.5, 0.5), Network("lora", "other"))
    assert pairs(prompt.parts[0].stages[0][1].sections[0]) == [("a cat", 1)]
    with pytest.raises(RequestError, match="no words for the network 'x'"):
        show(parse("<lora:x:1:0.5>", steps=1), dialect="compel")


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a (b c)+, d--", "a (b c)1.1, (d)0.81"),
        ("hot-dog (x)1.2 5", "hot-dog (x)1.2 5"),
        (r"(x)1.2(5 apples) c\+", r"(x)1.2(5 apples c\+)1"),
        (r"\(a\) b\-", r"\(a\) b\-"),
        ('("a+", "b").blend(0.7, 0.3)', '("(a)1.1", "b").blend(0.7, 0.3)'),
        ("(a, b).and()", '("a", "b").and(1, 1)'),
        ("a withLora(x, 0.5)", "a withLora(x, 0.5)"),
    ],
)
def test_the_canonical_form(text: str, printed: str) -> None:
    assert show(read(text)) == printed
    assert read(printed).parts == read(text).parts


def test_breaks_become_a_conjunction_and_back() -> None:
    broken = parse("a (b:1.2) BREAK c", steps=10)
    assert show(broken, dialect="compel") == '("a (b)1.2", "c").and(1, 1)'
    assert show(read('("a (b)1.2", "c").and()'), dialect="a1111") == "a (b:1.2) BREAK c"


@pytest.mark.parametrize("text", ["a [b:5]", "a AND b", "a :2"])
def test_what_this_dialect_cannot_say_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="dialect compel has no words for schedules and AND"):
        show(parse(text, steps=10), dialect="compel")


def test_a_weight_below_0_is_refused() -> None:
    with pytest.raises(RequestError, match="no words for a weight below 0"):
        show(parse("(a:-1)", steps=1), dialect="compel")
