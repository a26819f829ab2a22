"""Judging a picture by what was seen in it: detections made by hand, scenes with known answers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reverie.evaluate.scores import Share, answers, shares
from reverie.nets.judge import Detection
from reverie.train.judging import Truth
from reverie.train.scenes.scene import Place, Relation, Scene, Thing
from reverie.train.scenes.sprites import open_sprites
from tests.train.scenes.world import STYLES, THINGS, write_world


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return Truth(open_sprites(write_world(tmp_path_factory.mktemp("sprites"))), list(THINGS), STYLES)


def sure(n: int, of: int) -> torch.Tensor:
    """Log-probabilities of someone who is nearly sure of answer n."""
    return torch.where(torch.arange(of) == n, 5.0, 0.0).log_softmax(0)


def detection(truth: Truth, concept: str, x: float, y: float, **said: object) -> Detection:
    style, colour = str(said.get("style", "flat")), str(said.get("colour", "its own"))
    return Detection(
        x, y, 0.7, 0.9,
        sure(truth.concepts.index(concept), len(truth.concepts)),
        sure(truth.styles.index(style), len(truth.styles)),
        sure(truth.colours.index(colour), len(truth.colours)),
    )  # fmt: skip


def single(concept: str = "fox", colour: str | None = None) -> Scene:
    thing = Thing(concept, "flat", concept, colour)
    return Scene("coloured" if colour else "single", (thing,), None, (Place(0, 0.5, 0.5, 0.8),), ("white",), concept)


def pair(relation: Relation) -> Scene:
    things = (Thing("fox", "flat", "fox", "blue"), Thing("owl", "flat", "owl"))
    places = (Place(0, 0.3, 0.5, 0.4), Place(1, 0.7, 0.5, 0.4))
    return Scene("relation", things, relation, places, ("white",), "a blue fox and an owl")


def test_a_thing_as_it_was_asked_for(truth: Truth) -> None:
    found = [detection(truth, "fox", 0.5, 0.5)]
    assert answers(single(), found, truth) == {"object": [True], "style": [True], "all": [True]}
    assert answers(single(), [], truth) == {"object": [False], "style": [False], "all": [False]}


def test_another_thing_and_another_style(truth: Truth) -> None:
    other = answers(single("fox"), [detection(truth, "owl", 0.5, 0.5, style="retro")], truth)
    assert other == {"object": [False], "style": [False], "all": [False]}
    two = [detection(truth, "fox", 0.3, 0.5), detection(truth, "owl", 0.7, 0.5)]
    assert answers(single("fox"), two, truth) == {"object": [True], "style": [True], "all": [False]}


def test_the_colour_of_a_thing_is_judged_even_where_the_thing_is_not_known(truth: Truth) -> None:
    found = [detection(truth, "owl", 0.5, 0.5, colour="blue")]
    told = answers(single("fox", "blue"), found, truth)
    assert (told["object"], told["colour"]) == ([False], [True])
    assert answers(single("fox", "green"), found, truth)["colour"] == [False]


def test_a_thing_painted_in_its_own_colour_may_look_untouched(truth: Truth) -> None:
    untouched = [detection(truth, "fox", 0.5, 0.5)]
    assert answers(single("fox", "orange"), untouched, truth)["colour"] == [True]
    assert answers(single("fox", "blue"), untouched, truth)["colour"] == [False]
    assert truth.colours_of("fox", "flat", None) == (0, truth.colours.index("orange"))
    assert truth.colours_of("fox", "silhouette", None) == (0, 0)  # black ink is no colour


@pytest.mark.parametrize("seen", [1, 2, 3, 4])
def test_counting_is_exact_and_of_the_thing_itself(truth: Truth, seen: int) -> None:
    scene = replace(
        single(), kind="count", things=(Thing("fox", "flat", "fox", None, 3),), places=(Place(0, 0, 0, 1),) * 3
    )
    found = [detection(truth, "fox", n / 5, 0.5) for n in range(seen)]
    assert answers(scene, found, truth)["count"] == [seen == 3]
    assert answers(scene, found, truth)["all"] == [seen == 3]
    others = [*found[:-1], detection(truth, "owl", 0.9, 0.5)]
    assert answers(scene, others, truth)["count"] == [seen == 4]


@pytest.mark.parametrize(
    ("relation", "where"),
    [("left of", (-0.2, 0.05)), ("right of", (0.2, -0.05)), ("above", (0.05, -0.2)), ("below", (-0.05, 0.2))],
)
def test_places(truth: Truth, relation: Relation, where: tuple[float, float]) -> None:
    """Only the relation that holds is right; the first thing is at `where` from the middle, the second opposite."""
    x, y = where
    found = [
        detection(truth, "owl", 0.5 - x, 0.5 - y),
        detection(truth, "fox", 0.5 + x, 0.5 + y, colour="blue"),
    ]
    for other in ("left of", "right of", "above", "below"):
        assert answers(pair(other), found, truth)["relation"] == [other == relation]
    right = answers(pair(relation), found, truth)
    assert right["all"] == [True]
    assert right["object"] == [True, True]
    assert answers(pair(relation), found[:1], truth)["relation"] == [False]


def test_beside_one_another_has_no_order(truth: Truth) -> None:
    assert "relation" not in answers(pair("and"), [], truth)


def test_a_ring(truth: Truth) -> None:
    ring = replace(pair("in a ring of"), kind="ring")
    inside = detection(truth, "fox", 0.5, 0.5, colour="blue")
    corners = [detection(truth, "owl", 0.5 + x, 0.5 + y) for x, y in ((0, 0.4), (0, -0.4), (0.4, 0), (-0.4, 0))]
    assert answers(ring, [inside, *corners], truth)["relation"] == [True]
    assert answers(ring, [inside, *corners], truth)["all"] == [True]
    assert answers(ring, [inside, *corners[:3]], truth)["relation"] == [False]  # too few
    beside = [replace(one, x=one.x / 4, y=one.y) for one in corners]  # all on one side
    assert answers(ring, [inside, *beside], truth)["relation"] == [False]


@given(st.integers(1, 400), st.data())
def test_the_interval_is_wilsons(asked: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, asked))
    want = stats.binomtest(right, asked).proportion_ci(0.95, method="wilson")
    low, high = Share(right, asked).interval()
    assert low == pytest.approx(want.low, abs=1e-6)
    assert high == pytest.approx(want.high, abs=1e-6)


def test_shares_add_up() -> None:
    found = shares([{"object": [True, False]}, {"object": [True], "count": [False]}])
    assert found == {"object": Share(2, 3), "count": Share(0, 1)}
    assert found["object"].json() == pytest.approx(
        {"share": 2 / 3, "low": 0.2077, "high": 0.9385, "right": 2, "asked": 3}, abs=1e-4
    )
