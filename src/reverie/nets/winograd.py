"""3x3 convolutions with fewer multiplications: Lavin and Gray 2016, section 4.

A tile of 6x6 inputs gives 4x4 outputs by 36 products a channel instead of 144 (F(4x4, 3x3), float32); one of 4x4 inputs
2x2 outputs by 16 instead of 36 (F(2x2, 3x3), bfloat16, whose roundings the larger tile would multiply). Inputs and
weights are taken to values of polynomials at some points and at infinity, multiplied there, and brought back (Cook and
Toom). In between lie 36 or 16 matrix products, to which nearly all the work goes.
"""

from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """How pictures are cut.

    Attributes:
        size: outputs of a tile along one side.
        points: where polynomials are looked at, beside infinity; `size + 1` of them.
        worked: bytes of the inputs that are worked on at once: what follows finds them in the processor's cache.
    """

    size: int
    points: tuple[float, ...]
    worked: int

    @property
    def span(self) -> int:
        """Inputs of a tile along one side."""
        return self.size + 2

    @property
    def growth(self) -> float:
        """How many times as many numbers the weights are."""
        return self.span**2 / 9


TILES = {
    # Of all sets of five small points one of the least errors (Barabasz et al. 2020, table 2): smaller than that of
    # summing the nine products one after the other.
    torch.float32: Tiles(4, (0.0, 1.0, -1.0, 0.5, -2.0), 8 << 20),
    # Inputs are sums of two sums of two, outputs of nine, weights sums with quarters and halves: each is rounded.
    torch.bfloat16: Tiles(2, (0.0, 1.0, -1.0), 16 << 20),
}


@cache
def transforms(tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """What takes a tile's inputs and the 9 weights to the points, and products back; float64.

    Returns:
        `(span^2, span^2)`, `(span^2, 9)`, `(size^2, span^2)`.
    """
    points, last = tiles.points, tiles.size - 1
    back = [[point**power for point in points] + [float(power == last)] for power in range(tiles.size)]
    weights, inputs = [], []
    for point in points:
        others = [other for other in points if other != point]
        scale = prod(point - other for other in others)
        weights.append([point**power / scale for power in range(3)])
        inputs.append([*_polynomial(others), 0.0])
    weights.append([0.0, 0.0, 1.0])
    inputs.append(_polynomial(points))
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
def _rounded(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    inputs, weights, back = transforms(TILES[dtype])
    return inputs.to(dtype), weights.to(dtype), back.to(dtype)


def winograd_weight(weight: Tensor) -> Tensor:
    """Weights `(K, C, 3, 3)` at the points: `(36 or 16, K, C)` in their type."""
    width, channels = weight.shape[:2]
    return torch.mm(_rounded(weight.dtype)[1], weight.detach().reshape(-1, 9).t()).view(-1, width, channels)


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
    """A convolution with stride 1.

    Args:
        x: `(B, C, h, w)`, float32 or bfloat16, in any layout.
        weight: what `winograd_weight` gives, in the same type.
        padding: zeros above and below, left and right.

    Returns:
        `(B, K, h', w')`, channels last.
    """
    (count, channels, high, wide), width, tiling = x.shape, weight.shape[1], TILES[x.dtype]
    step, points = tiling.size, tiling.span**2
    size = high + 2 * padding[0] - 2, wide + 2 * padding[1] - 2
    rows, columns = (-(-side // step) for side in size)
    spread, pixels = columns * step + 2, x.permute(0, 2, 3, 1)
    made = x.new_empty(count, rows, step, columns, step, width)
    most = max(1, tiling.worked // (points * columns * channels * x.itemsize))  # rows of tiles
    pictures, lines = min(max(1, most // rows), count), min(most, rows)
    room = [x.new_empty(points * pictures * lines * columns * wanted) for wanted in (channels, channels, width)]
    edged = x.new_empty(pictures, lines * step + 2, spread, channels)
    for first in range(0, count, pictures):
        for top in range(0, rows, lines):
            out = made[first : first + pictures, top : top + lines]
            part = edged[: len(out), : out.shape[1] * step + 2]
            _padded(pixels[first : first + pictures], top * step - padding[0], padding[1], part)
            _worked(part, weight, out, room)
    y = made.view(count, rows * step, columns * step, width)[:, : size[0], : size[1]]
    y = y if bias is None else y.add_(bias)
    return y.permute(0, 3, 1, 2)


def _padded(x: Tensor, top: int, left: int, made: Tensor) -> None:
    """Lines of pictures `(b, h, w, C)` from `top` on, which may lie above them, with zeros all around, into `made`."""
    first = max(top, 0)
    last = max(min(top + made.shape[1], x.shape[1]), first)
    inner = slice(first - top, last - top), slice(left, left + x.shape[2])
    for edge in (made[:, : inner[0].start], made[:, inner[0].stop :], made[:, :, :left], made[:, :, inner[1].stop :]):
        edge.zero_()
    made[:, inner[0], inner[1]] = x[:, first:last]


def _worked(padded: Tensor, weight: Tensor, made: Tensor, room: list[Tensor]) -> None:
    """Some rows of some pictures `(b, h, w, C)` -> their outputs, into `made` `(b, r, size, c, size, K)`."""
    pictures, rows, step, columns, _, width = made.shape
    channels, number, points = padded.shape[-1], pictures * rows * columns, (step + 2) ** 2
    values = room[1][: points * number * channels].view(step + 2, step + 2, pictures, rows, columns, channels)
    products = room[2][: points * number * width].view(points, number, width)
    (_summed if step == 2 else _multiplied)(padded, values, room[0])
    torch.bmm(values.view(points, number, channels), weight.transpose(1, 2), out=products)
    outputs = torch.mm(_rounded(padded.dtype)[2], products.view(points, -1))
    made.copy_(outputs.view(step, step, pictures, rows, columns, width).permute(2, 3, 0, 4, 1, 5))


def _multiplied(padded: Tensor, values: Tensor, room: Tensor) -> None:
    """Pictures to the values `(span, span, b, r, c, C)` of their tiles at the points, as one product of matrices."""
    (picture, line, point, _), step = padded.stride(), len(values) - 2
    strides = line, point, picture, line * step, point * step, 1
    gathered = room[: values.numel()].view(values.shape)
    gathered.copy_(padded.as_strided(values.shape, strides, padded.storage_offset()))
    torch.mm(_rounded(padded.dtype)[0], gathered.flatten(0, 1).flatten(1), out=values.flatten(0, 1).flatten(1))


def _summed(padded: Tensor, values: Tensor, room: Tensor) -> None:
    """The same for tiles of four inputs a side, whose values are sums of two, downwards and then across.

    Numbers are rounded once more than by a product, and moved less.
    """
    _, _, pictures, rows, columns, channels = values.shape
    wide = padded.shape[2]
    across = room[: 4 * pictures * rows * wide * channels].view(4, pictures, rows, wide, channels)
    _sums([padded[:, k : k + 2 * rows - 1 : 2] for k in range(4)], across)
    _sums([across[:, :, :, k : k + 2 * columns - 1 : 2] for k in range(4)], values.transpose(0, 1))


def _sums(inputs: list[Tensor], made: Tensor) -> None:
    """Polynomials of F(2, 3) at 0, 1, -1 and infinity: `transforms`' matrix of one side."""
    first, second, third, fourth = inputs
    torch.sub(third, first, out=made[0])
    torch.add(second, third, out=made[1])
    torch.sub(third, second, out=made[2])
    torch.sub(fourth, second, out=made[3])
