"""Walks in ComfyUI's graphs."""

import pytest

from reverie.engine.metadata.comfy_graph import MOST_NODES, Graph
from reverie.errors import RequestError
from tests.engine.metadata.samples import Json, comfy, node


def test_a_walk_follows_the_named_inputs_and_else_the_only_one() -> None:
    graph = Graph.of(comfy(n8=node("Reroute", **{"": ["3", 0]})))
    found = [one.kind for one in graph.walk(graph.nodes["9"], "images", "latent_image")]
    assert found == ["SaveImage", "Reroute", "KSampler", "EmptyLatentImage"]


def test_a_circle_is_walked_once() -> None:
    graph = Graph.of({"1": node("A", x=["2", 0]), "2": node("B", x=["1", 0]), "3": node("C", x=["3", 0])})
    assert [one.number for one in graph.walk(graph.nodes["1"], "x")] == ["1", "2"]
    assert [one.number for one in graph.walk(graph.nodes["3"], "x")] == ["3"]
    assert graph.literal(graph.nodes["3"], "x") is None


@pytest.mark.parametrize(
    ("more", "value"),
    [
        ({"1": node("A", seed=7)}, 7),
        ({"1": node("A", seed=["2", 0]), "2": node("PrimitiveInt", value=8)}, 8),
        ({"1": node("A", seed=["2", 0]), "2": node("Seed (rgthree)", seed=9)}, 9),
        ({"1": node("A", seed=["2", 0]), "2": node("Reroute", **{"": ["3", 0]}), "3": node("Int", int=10)}, 10),
        ({"1": node("A", seed=["2", 0]), "2": node("B", model=["3", 0]), "3": node("Int", int=10)}, None),
        ({"1": node("A", seed=["gone", 0])}, None), ({"1": node("A", seed=[["1"], 0])}, None),
        ({"1": node("A", seed={"a": 1})}, None), ({"1": node("A", seed=["1"])}, None), ({"1": node("A")}, None),
        ({"1": node("A", seed=10**30)}, str(10**30)),
    ],
)  # fmt: skip
def test_values_are_fetched_through_links(more: Json, value: object) -> None:
    graph = Graph.of(more)
    assert graph.literal(graph.nodes["1"], "seed") == value


def test_as_it_is_sent_to_the_server() -> None:
    assert Graph.of({"prompt": comfy(), "client_id": "x"}).nodes.keys() == comfy().keys()


@pytest.mark.parametrize("value", [{}, {"1": 3}, {"1": {"class_type": "A"}}, {"1": {"class_type": 3, "inputs": {}}}])
def test_what_is_no_graph(value: Json) -> None:
    with pytest.raises(RequestError, match="no nodes with class_type and inputs"):
        Graph.of(value)


def test_too_many_nodes() -> None:
    with pytest.raises(RequestError, match=f"at most {MOST_NODES:,} are read"):
        Graph.of({str(i): node("A") for i in range(MOST_NODES + 1)})
