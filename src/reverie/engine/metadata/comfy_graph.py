"""ComfyUI's graph in its API form, and walks in it from a result back to what it came from.

A walk visits a node at most once: a graph with circles, or with a million nodes, ends.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reverie.errors import RequestError

PICTURE = ("latent_image", "samples", "latent", "pixels", "images", "image", "input", "source")
OTHER = {"model", "clip", "vae", "positive", "negative", "mask", "control_net", "upscale_model", "sampler", "sigmas",
         "noise", "guider", "conditioning"}  # fmt: skip
VALUE = ("value", "text", "string", "number", "int", "float", "seed", "noise_seed")  # inputs of nodes that give one
MOST_NODES, MOST_HOPS = 5000, 20
MOST_NUMBER = 2**64  # above, a number is kept as text: arithmetic with it could fail


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        number: its key in the graph.
        kind: its `class_type`.
        inputs: literals, and links as `[number, output]`.
    """

    number: str
    kind: str
    inputs: dict[str, Any]

    def literals(self) -> dict[str, Any]:
        """The inputs that are no links."""
        return {name: value for name, value in self.inputs.items() if not isinstance(value, list)}

    def is_sampler(self) -> bool:
        """Whether it runs a sampler: the core nodes, and others that look like them."""
        return self.kind in {"SamplerCustom", "SamplerCustomAdvanced"} or {"sampler_name", "steps", "cfg"} <= (
            self.inputs.keys()
        )


class Graph:
    """Nodes by their numbers."""

    def __init__(self, nodes: dict[str, Node]) -> None:
        self.nodes = nodes

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> "Graph":
        """From the object that the JSON is.

        Raises:
            RequestError: not such a graph.
        """
        if isinstance(value.get("prompt"), dict):  # as it is sent to the server
            value = value["prompt"]
        nodes = {
            number: Node(number, node["class_type"], node["inputs"])
            for number, node in value.items()
            if isinstance(node, dict)
            and isinstance(node.get("class_type"), str)
            and isinstance(node.get("inputs"), dict)
        }
        if not nodes:
            raise RequestError("ComfyUI's prompt has no nodes with class_type and inputs; it is no graph that ran")
        if len(nodes) > MOST_NODES:
            raise RequestError(f"ComfyUI's prompt has {len(nodes):,} nodes; at most {MOST_NODES:,} are read")
        return cls(nodes)

    def linked(self, node: Node, *names: str) -> Node | None:
        """The node that the first of these inputs with a link comes from."""
        for name in names:
            value = node.inputs.get(name)
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int):
                found = self.nodes.get(str(value[0]))
                if found is not None:
                    return found
        return None

    def literal(self, start: Node | None, *names: str) -> Any:
        """The value of the first of these inputs that has one, fetched through links; None if none has."""
        node, searched = start, names
        for _ in range(MOST_HOPS):
            if node is None:
                return None
            for name in searched:
                value = node.inputs.get(name)
                if value is not None and not isinstance(value, list | dict):
                    return value if not isinstance(value, int) or abs(value) < MOST_NUMBER else str(value)
            node = self.linked(node, *searched) or (None if node is start else self._onwards(node))
            searched = (*names, *VALUE)
        return None

    def walk(self, node: Node | None, *names: str) -> Iterator[Node]:
        """`node` and what comes before it, along the first of these inputs that is linked, else along any other."""
        seen: set[str] = set()
        while node is not None and node.number not in seen:
            seen.add(node.number)
            yield node
            node = self.linked(node, *names) or self._onwards(node)

    def _onwards(self, node: Node) -> Node | None:
        """Through a node of an unknown kind, for example a reroute, which has one input without a name."""
        return self.linked(node, *(name for name in node.inputs if name not in OTHER))
