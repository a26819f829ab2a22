"""What a picture shows against what was asked for, as a judge sees it; shares of right answers."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from reverie.nets.judge import Detection
from reverie.train.judging import Truth
from reverie.train.scenes.scene import Relation, Scene

Question = Literal["object", "style", "colour", "count", "relation", "all"]
Answers: TypeAlias = dict[Question, list[bool]]
"""Whether each thing that was asked for is there: one answer a thing for `object` and `colour`, else one a picture."""

NORMAL_95 = 1.959964  # quantile of the normal distribution for an interval of 95 %
AROUND, OPEN = 4, math.pi  # things in a ring, at least; and the widest gap that it may have


def answers(scene: Scene, found: Sequence[Detection], truth: Truth) -> Answers:
    """Judge one picture.

    A thing counts as drawn where the judge, choosing among all that it knows, names it. What is said of the thing
    (colour, place) is judged on the detections that look more like it than like the scene's other thing.

    Args:
        found: what the judge sees.
        truth: the judge's names.
    """
    own = _assigned(scene, found, truth)
    numbers = [truth.concepts.index(thing.concept) for thing in scene.things]
    named = [[one for one in mine if int(one.concept.argmax()) == n] for mine, n in zip(own, numbers, strict=True)]
    given: Answers = {"object": [bool(mine) for mine in named], "style": [_style(scene, found, truth)]}
    painted = [n for n, thing in enumerate(scene.things) if thing.colour is not None]
    given["colour"] = [_colour(scene, n, own[n], truth) for n in painted]
    if scene.kind == "count":
        given["count"] = [len(named[0]) == scene.things[0].count]
    if scene.relation not in {None, "and"}:
        given["relation"] = [_stand(scene.relation, named[0], named[1])]
    as_many = scene.kind == "ring" or len(found) == len(scene.places)
    given["all"] = [as_many and all(right for each in given.values() for right in each)]
    return {question: each for question, each in given.items() if each}


def _assigned(scene: Scene, found: Sequence[Detection], truth: Truth) -> list[list[Detection]]:
    """To each thing of the scene the detections that look most like it."""
    numbers = [truth.concepts.index(thing.concept) for thing in scene.things]
    own: list[list[Detection]] = [[] for _ in numbers]
    for one in found:
        own[int(one.concept[numbers].argmax())].append(one)
    return own


def _style(scene: Scene, found: Sequence[Detection], truth: Truth) -> bool:
    if not found:
        return False
    together = torch.stack([one.style for one in found]).sum(0)
    return truth.styles[int(together.argmax())] == scene.things[0].style


def _colour(scene: Scene, number: int, own: Sequence[Detection], truth: Truth) -> bool:
    if not own:
        return False
    thing = scene.things[number]
    together = torch.stack([one.colour for one in own]).sum(0)
    return int(together.argmax()) in truth.colours_of(thing.concept, thing.style, thing.colour)


def _stand(relation: Relation | None, first: Sequence[Detection], second: Sequence[Detection]) -> bool:
    """Whether the first are left of (above, inside a ring of ...) the second."""
    if not first or not second:
        return False
    if relation == "in a ring of":
        return _ringed(first, second)
    (ax, ay), (bx, by) = _middle(first), _middle(second)
    across, down = bx - ax, by - ay
    along = {"left of": across, "right of": -across, "above": down, "below": -down}
    assert relation in along
    return along[relation] > 0 and along[relation] == max(abs(across), abs(down))


def _ringed(inside: Sequence[Detection], around: Sequence[Detection]) -> bool:
    x, y = _middle(inside)
    angles = sorted(math.atan2(one.y - y, one.x - x) for one in around)
    if len(angles) < AROUND:
        return False
    gaps = [b - a for a, b in zip(angles, [*angles[1:], angles[0] + 2 * math.pi], strict=True)]
    return max(gaps) < OPEN


def _middle(found: Sequence[Detection]) -> tuple[float, float]:
    return sum(one.x for one in found) / len(found), sum(one.y for one in found) / len(found)


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    right: int
    asked: int

    @property
    def value(self) -> float:
        """In [0, 1]."""
        return self.right / self.asked

    def interval(self) -> tuple[float, float]:
        """Where the true share lies with 95 % confidence (Wilson 1927): good near 0 and 1, too."""
        n, p, z = self.asked, self.value, NORMAL_95
        middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return max((middle - half) / (1 + z**2 / n), 0.0), min((middle + half) / (1 + z**2 / n), 1.0)

    def json(self) -> dict[str, float]:
        """Share, bounds of its interval, and the numbers."""
        low, high = self.interval()
        return {"share": self.value, "low": low, "high": high, "right": self.right, "asked": self.asked}


def shares(given: Iterable[Answers]) -> dict[Question, Share]:
    """All answers to each question that was asked."""
    right: dict[Question, int] = {}
    asked: dict[Question, int] = {}
    for one in given:
        for question, each in one.items():
            right[question] = right.get(question, 0) + sum(each)
            asked[question] = asked.get(question, 0) + len(each)
    return {question: Share(right[question], asked[question]) for question in asked}
