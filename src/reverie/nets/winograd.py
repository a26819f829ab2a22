"""3x3 convolutions with a quarter of the multiplications: F(4x4, 3x3) of Lavin and Gray 2016, section 4.2.

A tile of 6x6 inputs gives 4x4 outputs by 36 products a channel instead of 144: inputs and weights are taken to values
of polynomials at five points and at infinity, multiplied there, and brought back (Cook and Toom). In between lie 36
matrix products, to which nearly all the work goes.
"""

from functools import cache
from math import prod

import torch
from torch import Tensor

TILE = 4  # outputs of a tile along one side
SPAN = TILE + 2  # inputs
GROWTH = SPAN * SPAN / 9  # of the weights
# Of all sets of five small points one of the least errors (Barabasz et al. 2020, table 2): smaller than that of summing
# the nine products one after the other.
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
WORKED = 8 << 20  # bytes of the inputs that are worked on at once: what follows finds them in the processor's cache


@cache
def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """What takes inputs `(36, 36)` and weights `(36, 9)` to the points, and products back `(16, 36)`; float64."""
    back = [[point**power for point in POINTS] + [float(power == TILE - 1)] for power in range(TILE)]
    weights, inputs = [], []
    for point in POINTS:
        others = [other for other in POINTS if other != point]
        scale = prod(point - other for other in others)
        weights.append([point**power / scale for power in range(3)])
        inputs.append([*_polynomial(others), 0.0])
    weights.append([0.0, 0.0, 1.0])
    inputs.append(_polynomial(POINTS))
    both = (torch.tensor(rows, dtype=torch.float64) for rows in (inputs, weights, back))
    one, two, three = (torch.kron(matrix, matrix) for matrix in both)
    return one, two, three


def _polynomial(roots: list[float] | tuple[float, ...]) -> list[float]:
    """Coefficients of the product of (x - root), the lowest power first."""
    found = [1.0]
    for root in roots:
        found = [low - root * high for low, high in zip([0.0, *found], [*found, 0.0], strict=True)]
    return found


@cache
def _rounded() -> tuple[Tensor, Tensor, Tensor]:
    inputs, weights, back = transforms()
    return inputs.float(), weights.float(), back.float()


def winograd_weight(weight: Tensor) -> Tensor:
    """Weights `(K, C, 3, 3)` at the points: `(36, K, C)` float32."""
    width, channels = weight.shape[:2]
    return torch.mm(_rounded()[1], weight.detach().reshape(-1, 9).t()).view(SPAN * SPAN, width, channels)


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
    """A convolution with stride 1.

    Args:
        x: `(B, C, h, w)` float32, in any layout.
        weight: what `winograd_weight` gives.
        padding: zeros above and below, left and right.

    Returns:
        `(B, K, h', w')`, channels last.
    """
    (count, channels, high, wide), width = x.shape, weight.shape[1]
    size = high + 2 * padding[0] - 2, wide + 2 * padding[1] - 2
    rows, columns = (-(-side // TILE) for side in size)
    padded = x.new_zeros(count, rows * TILE + 2, columns * TILE + 2, channels)
    padded[:, padding[0] : padding[0] + high, padding[1] : padding[1] + wide] = x.permute(0, 2, 3, 1)
    picture, line, point, _ = padded.stride()
    tiles = padded.as_strided(
        (SPAN, SPAN, count, rows, columns, channels), (line, point, picture, line * TILE, point * TILE, 1)
    )
    made = x.new_empty(count, rows, TILE, columns, TILE, width)
    most = max(1, WORKED // (SPAN * SPAN * columns * channels * x.itemsize))  # rows of tiles
    pictures, lines = max(1, most // rows), min(most, rows)
    room = [x.new_empty(SPAN * SPAN * pictures * lines * columns * wanted) for wanted in (channels, channels, width)]
    for first in range(0, count, pictures):
        for top in range(0, rows, lines):
            here = slice(first, first + pictures), slice(top, top + lines)
            _worked(tiles[:, :, here[0], here[1]], weight, made[here[0], here[1]], room)
    y = made.view(count, rows * TILE, columns * TILE, width)[:, : size[0], : size[1]]
    y = y if bias is None else y.add_(bias)
    return y.permute(0, 3, 1, 2)


def _worked(tiles: Tensor, weight: Tensor, made: Tensor, room: list[Tensor]) -> None:
    """Some tiles `(6, 6, b, r, c, C)` -> their outputs, into `made` `(b, r, 4, c, 4, K)`."""
    inputs, _, back = _rounded()
    *_, pictures, rows, columns, channels = tiles.shape
    number, points, width = pictures * rows * columns, SPAN * SPAN, weight.shape[1]
    gathered, values, products = (
        space[: points * number * wanted].view(points, -1)
        for space, wanted in zip(room, (channels, channels, width), strict=True)
    )
    gathered.view(tiles.shape).copy_(tiles)
    torch.mm(inputs, gathered, out=values)
    torch.bmm(values.view(points, number, channels), weight.transpose(1, 2), out=products.view(points, number, width))
    outputs = torch.mm(back, products).view(TILE, TILE, pictures, rows, columns, width)
    made.copy_(outputs.permute(2, 3, 0, 4, 1, 5))
