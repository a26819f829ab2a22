"""Where things stand, in parts of the picture's width; squares never overlap and never leave the picture.

`scatter` is how much of the room that there is is used by chance: at 1 all of it, at 0 everything is as large as it may
be and stands in the middle of its place, so that a caption leaves nothing open.
"""

import math
from collections.abc import Sequence

from numpy.random import Generator

from reverie.train.scenes.scene import Place, Relation, Size

# Sides of the square of a single thing.
USUAL, SMALL, LARGE = (0.70, 0.88), (0.30, 0.42), (0.94, 0.99)
# Of its cell, a drawing fills at least this much.
FILLED = (0.78, 0.95)
# Centres and half widths of the cells of two, three (in a triangle or in a row) and four things.
TWO = ((0.26, 0.5), (0.74, 0.5))
TWO_STACKED = ((0.5, 0.26), (0.5, 0.74))
TRIANGLE = ((0.5, 0.26), (0.26, 0.74), (0.74, 0.74))
ROW = ((0.18, 0.5), (0.5, 0.5), (0.82, 0.5))
FOUR = ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74))
HALF, HALF_OF_ROW = 0.48, 0.32
# Sides of the squares of a ring and of what it surrounds.
RINGED, MIDDLE = (0.19, 0.22), (0.38, 0.42)


def single(g: Generator, size: Size | None, scatter: float = 1) -> tuple[Place, ...]:
    """One thing near the middle; a small one may stand anywhere."""
    side = _side(g, {None: USUAL, "small": SMALL, "large": LARGE}[size], scatter)
    free = (1 - side) / 2
    reach = scatter * free * (0.8 if size == "small" else 0.5)
    return (Place(0, 0.5 + float(g.uniform(-reach, reach)), 0.5 + float(g.uniform(-reach, reach)), side),)


def several(g: Generator, count: int, scatter: float = 1) -> tuple[Place, ...]:
    """`count` drawings of thing 0, from two to four, all of one size."""
    shapes = {2: (TWO, TWO, TWO_STACKED), 3: (TRIANGLE, TRIANGLE, ROW), 4: (FOUR,)}[count]
    cells = shapes[int(scatter * g.integers(len(shapes)))]
    cell = HALF_OF_ROW if cells is ROW else HALF
    side = cell * _side(g, FILLED, scatter)
    return tuple(_within(g, 0, centre, cell, side, scatter) for centre in cells)


def pair(g: Generator, relation: Relation, scatter: float = 1) -> tuple[Place, ...]:
    """Two things: thing 0 stands in the relation to thing 1."""
    cells: Sequence[tuple[float, float]] = TWO_STACKED if relation in {"above", "below"} else TWO
    if relation in {"right of", "below"}:
        cells = cells[::-1]
    return tuple(
        _within(g, n, centre, HALF, HALF * _side(g, FILLED, scatter), scatter) for n, centre in enumerate(cells)
    )


def ring(g: Generator, scatter: float = 1) -> tuple[Place, ...]:
    """Thing 0 in the middle, six to eight drawings of thing 1 around it."""
    count = 6 + int(scatter * g.integers(3))
    turn = scatter * float(g.uniform(0, 2 * math.pi))
    side = _side(g, RINGED, scatter)
    radius = 0.375
    angles = [turn + 2 * math.pi * n / count for n in range(count)]
    around = [Place(1, 0.5 + radius * math.sin(a), 0.5 - radius * math.cos(a), side) for a in angles]
    return (Place(0, 0.5, 0.5, _side(g, MIDDLE, scatter)), *around)


def _side(g: Generator, bounds: tuple[float, float], scatter: float) -> float:
    """Between the bounds, or near the upper one."""
    least, most = bounds
    return float(g.uniform(most - scatter * (most - least), most))


def _within(g: Generator, thing: int, centre: tuple[float, float], cell: float, side: float, scatter: float) -> Place:
    """Somewhere in a cell."""
    reach = scatter * (cell - side) / 2
    return Place(thing, centre[0] + float(g.uniform(-reach, reach)), centre[1] + float(g.uniform(-reach, reach)), side)
