"""What a composed picture shows: the truth that its caption tells, and that a drawing of it can be judged by."""

from dataclasses import dataclass
from typing import Literal

Size = Literal["small", "large"]
Kind = Literal["single", "coloured", "count", "relation", "ring"]
Relation = Literal["and", "left of", "right of", "above", "below", "in a ring of"]


@dataclass(frozen=True)
class Thing:
    """One kind of thing in a scene.

    Attributes:
        concept, style: which sprite.
        word: the name that the caption uses.
        colour: what it is painted in; None leaves it its own colours.
        size: said in the caption; None is the usual size, which is not said.
    """

    concept: str
    style: str
    word: str
    colour: str | None = None
    count: int = 1
    size: Size | None = None


@dataclass(frozen=True)
class Place:
    """Where one drawing of a thing stands: centre and side of its square, in parts of the picture's width.

    Attributes:
        thing: its number in `Scene.things`.
    """

    thing: int
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Scene:
    """A picture to compose.

    Attributes:
        things: one, or two that stand in `relation`: the first is left of (above, inside a ring of ...) the second.
        background: one colour name, or two for a gradient from top to bottom.
        language: "en", or the locale that the caption is in.
    """

    kind: Kind
    things: tuple[Thing, ...]
    relation: Relation | None
    places: tuple[Place, ...]
    background: tuple[str, ...]
    caption: str
    language: str = "en"
