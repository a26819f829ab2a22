"""Dynamic prompts: the grammar, the draw of a seed, all combinations, circles and explosions."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.errors import RequestError
from reverie.text.wildcard_files import Wildcards
from reverie.text.wildcards import DEEPEST, Template, resolve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "colours.txt": "red\ngreen\nblue\n",
        "weighted.txt": "0::never\n3::often\nseldom\n",
        "animals/birds.txt": "# feathered\n\n  crow  \n{small|large} owl\n",
        "animals/fish.txt": "cod",
        "nested.txt": "__colours__ __animals/fish__",
        "self.txt": "again __self__",
        "a.txt": "__b__",
        "b.txt": "__a__",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def every(text: str, folder: Path | None = None, limit: int = 1000) -> list[str]:
    return list(Template.parse(text).combinations(Wildcards(folder), limit=limit))


# As dynamicprompts 0.31 enumerates them.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, (text:1.2) [a|b] | c", ["plain, (text:1.2) [a|b] | c"]),
        ("x {a|b} y", ["x a y", "x b y"]),
        ("{ red | blue } x", ["red  x", "blue  x"]),
        ("{a|b} {c|d}", ["a c", "a d", "b c", "b d"]),
        ("{a|}", ["a", ""]),
        ("{}", [""]),
        ("{a}", ["a"]),
        ("{{a|b}|c}", ["a", "b", "c"]),
        ("{a{1|2}|b}", ["a1", "a2", "b"]),
        ("{2$$a|b|c}", ["a,b", "a,c", "b,a", "b,c", "c,a", "c,b"]),
        ("{1-2$$ and $$a|b}", ["a", "b", "a and b", "b and a"]),
        ("{0-1$$a}", ["", "a"]),
        ("{-2$$a|b}", ["a", "b", "a,b", "b,a"]),
        ("{2-$$a|b}", ["a,b", "b,a"]),
        ("{3$$a|b}", ["a,b", "b,a"]),
        ("{2-1$$ $$a|b}", ["a", "b", "a b", "b a"]),
        ("{2$$|$$a|b}", ["a|b", "b|a"]),
        ("{2$${a|b}|c}", ["a,c", "b,c", "c,a", "c,b"]),
        ("{0.5::a|2::b}", ["a", "b"]),
        ("{0::a|.5::b|c}", ["b", "c"]),
        ("{0::a|0::b}", ["a", "b"]),
        ("${x={red|blue}}${x} ${x}", ["red red", "red blue", "blue red", "blue blue"]),
        ("${x = red }[${x}]", ["[red ]"]),
        ("${x:grey} ${x=a}${x:grey}", ["grey a"]),
        ("${y=a|b}${y}", ["a|b"]),
        # Ours: a variable that is drawn at once is enumerated too.
        ("${x=!{red|blue}}${x} ${x}", ["red red", "blue blue"]),
        # Escapes; a backslash before anything else stays for the dialect.
        (r"\{a\|b\} \$\{x\} \_\_c\_\_", [r"{a\|b} ${x} __c__"]),
        (r"{a\|b|c\}}", ["a|b", "c}"]),
        (r"\(a\) \\{b|c}", [r"\(a\) \\b", r"\(a\) \\c"]),
        # What does not fit is text.
        ("{a|{b|c} d", ["{a|b d", "{a|c d"]),
        ("{2$$a|b", ["{2$$a|b"]),
        ("${x=a", ["${x=a"]),
        ("${} a} $ __ _x_ ____", ["${} a} $ __ _x_ ____"]),
    ],
)
def test_combinations(text: str, expected: list[str]) -> None:
    assert every(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a __colours__ cat", ["a red cat", "a green cat", "a blue cat"]),
        ("__nested__", ["red cod", "green cod", "blue cod"]),
        ("__animals/*__", ["crow", "small owl", "large owl", "cod"]),
        ("__**/f*__", ["cod"]),
        ("{2$$ $$__colours__}", ["red green", "red blue", "green red", "green blue", "blue red", "blue green"]),
        ("{__animals/fish__|x}", ["cod", "x"]),
        ("__weighted__", ["often", "seldom"]),
        ("${c=__colours__}${c}", ["red", "green", "blue"]),
        ("(__animals/fish__:1.2)", ["(cod:1.2)"]),
    ],
)
def test_wildcards(text: str, expected: list[str], folder: Path) -> None:
    assert every(text, folder) == expected


def test_a_seed_always_draws_the_same() -> None:
    # The figures are what every Python gives: Mersenne Twister from an int seed, `random()` and arithmetic on it.
    text = "{a|b|c|d|e|f|g|h} {2$$1|2|3|4} {5::x|1::y}"
    assert [resolve(text, seed=seed) for seed in (0, 1, 2, 2**64 - 1)] == ["g 4,2 x", "b 4,3 x", "h 4,1 x", "a 2,1 x"]
    assert resolve("{a|b}", seed=5) == resolve("{a|b}", seed=5, folder=None)


def test_weights_are_kept() -> None:
    drawn = Counter(resolve("{0::x|3::a|b}", seed=seed) for seed in range(4000))
    assert drawn.keys() == {"a", "b"}
    # 3000 expected; the standard deviation is sqrt(4000 * 3/4 * 1/4) = 27.
    assert abs(drawn["a"] - 3000) < 5 * 27


def test_every_number_of_options_is_as_likely() -> None:
    drawn = Counter(resolve("{0-3$$a|b|c}", seed=seed).count(",") for seed in range(400))
    lengths = Counter(len(resolve("{0-3$$a|b|c}", seed=seed)) for seed in range(4000))
    assert drawn.keys() == {0, 1, 2}
    # 1000 expected of each; the standard deviation is sqrt(4000 * 1/4 * 3/4) = 27.
    assert all(abs(n - 1000) < 5 * 27 for n in lengths.values())


PARTS = ["a", "b ", "{", "}", "|", "$$", "2$$", "1-2$$", "${x=", "${x}", "${x:", "::", "2::", "\\", "__c__", "_", "$"]
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PARTS), max_size=16).map("".join))


@settings(deadline=None)
@given(TEXTS, st.integers(0, 2**64))
def test_any_text_is_drawn_or_refused_in_one_line(text: str, seed: int) -> None:
    template = Template.parse(text)
    try:
        drawn = template.draw(seed)
    except RequestError as error:
        assert "\n" not in str(error)
    else:
        assert drawn == template.draw(seed)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "{b|c}", "{2$$d|e|f}", "{g|{h|i}}", "${x={j|k}}${x}"]), max_size=3).map(" ".join))
def test_what_is_drawn_is_one_of_the_combinations(text: str) -> None:
    possible = every(text)
    assert len(set(possible)) == len(possible)
    assert {resolve(text, seed=seed) for seed in range(20)} <= set(possible)


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="\\{}$_"), max_size=50), st.integers(0, 9))
def test_text_without_marks_stays(text: str, seed: int) -> None:
    assert resolve(text, seed=seed) == text


def test_brackets_that_do_not_match_are_told() -> None:
    assert Template.parse("{a|b}").warnings == ()
    assert Template.parse("{a} b}").warnings == ("1 closing curly bracket(s) without opening one: read as text",)
    assert Template.parse("{a {b ${c=}").warnings == ("2 opening curly bracket(s) without closing one: read as text",)


def test_combinations_are_limited() -> None:
    assert len(every("{a|b}" * 4, limit=16)) == 16
    drawn = Template.parse("{a|b}" * 64).combinations(limit=3)
    assert [next(drawn) for _ in range(3)] == ["a" * 64, "a" * 63 + "b", "a" * 62 + "ba"]
    with pytest.raises(RequestError, match="the prompt has more than 3 combinations"):
        next(drawn)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__colour__", "unknown wildcard 'colour'; did you mean 'colours'?"),
        ("__self__", r"circle: __self__ -> __self__"),
        ("{x|__a__}", r"circle: __a__ -> __b__ -> __a__"),
        ("${x=${y}}${y=${x}}${x}", r"circle: \$\{x\} -> \$\{y\} -> \$\{x\}"),
        ("${colour=red}${color}", r"unknown variable \$\{color\}; did you mean \$\{colour\}\?"),
        ("${x} ${x=a}", r"unknown variable \$\{x\}; set it before, with \$\{x=...\}"),
        ("{" * 60 + "a" + "}" * 60, f"nested more than {DEEPEST} deep"),
        (
            "".join(f"${{v{n + 1}=${{v{n}}}${{v{n}}}}}" for n in range(30)) + "${v0=x}${v30}",
            "beyond 1,000,000 characters",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(text: str, message: str, folder: Path) -> None:
    with pytest.raises(RequestError, match=message):
        list(Template.parse(text).combinations(Wildcards(folder)))


def test_a_wildcard_without_a_folder_is_refused() -> None:
    with pytest.raises(RequestError, match="asks for wildcard 'colours', but no folder of wildcards was given"):
        resolve("a __colours__ cat", seed=1)
    assert resolve(r"a \__colours__ cat", seed=1) == "a __colours__ cat"


@pytest.mark.parametrize(
    "text", ["{" * 100_000, "}" * 100_000, "{a|" * 50_000 + "b" + "}" * 50_000, "${x=" * 50_000 + "}"]
)
def test_nesting_does_not_recurse(text: str) -> None:
    template = Template.parse(text)
    try:
        # Nothing of it is more than text, or the first options were drawn.
        assert set(template.draw(0)) <= set(text)
    except RequestError as error:
        assert f"nested more than {DEEPEST} deep" in str(error)
