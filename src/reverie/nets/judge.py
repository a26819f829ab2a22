"""The judge: a small network that says which things stand where in a picture, in what style and colour.

It looks twice. The finder works as CenterNet does (Zhou et al. 2019, "Objects as Points"): a map a quarter as wide as
the picture has a peak at the centre of every thing, and says there how large the thing is. The namer is shown each
thing, cut out and brought to one size as in Fast R-CNN (Girshick 2015), and says what it is. Things of one size in the
middle of their square are learned from far fewer pictures than things of any size anywhere.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 4  # pixels of a cell of the map
COARSEST = 16  # pixels that one cell of the finder's deepest level sees; a picture's sides are multiples of it
CUT = 32  # pixels of a thing that was cut out
ROOM = 1.1  # of the square that is cut out, in sides of the thing
GROUPS = 8
RARE = 0.01  # how likely a cell is a centre before anything is learned (Lin et al. 2017, section 4.1)
NO_COLOUR = "its own"
LEAST = 0.3  # score of what counts as a thing
MOST = 16  # things in a picture


@dataclass(frozen=True)
class JudgeConfig:
    """What a judge knows.

    Attributes:
        concepts, styles: names.
        colours: names of what things are painted in; the first is `NO_COLOUR`.
        size: width and height of the pictures that it learned from.
        finder: channels where pictures are 1/2, 1/4 and 1/8 as wide.
        namer: channels where what was cut out is 1/2, 1/4 and 1/8 as wide.
        hidden: channels of what the namer makes of it.
    """

    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    colours: tuple[str, ...]
    size: int = 64
    finder: tuple[int, int, int] = (16, 24, 48)
    namer: tuple[int, int, int] = (32, 64, 128)
    hidden: int = 256


@dataclass(frozen=True)
class Maps:
    """What the finder says of every cell of pictures; `h` and `w` are a quarter of their sides.

    Attributes:
        centre: `(B, h, w)`, whether a thing has its centre here, before the sigmoid.
        side: `(B, h, w)`, the logarithm of the side of the thing's square, in parts of the picture's width.
        offset: `(B, 2, h, w)`, from the middle of the cell to that of the thing, right and down, in cells.
    """

    centre: Tensor
    side: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Names:
    """What the namer says of K things, before the softmax: `(K, n)` each, in the order of the config."""

    concept: Tensor
    style: Tensor
    colour: Tensor


@dataclass(frozen=True)
class Detection:
    """A thing that the judge sees.

    Attributes:
        x, y, side: centre and side of its square, in parts of the picture's width and height.
        score: how sure it is that there is something, in [0, 1].
        concept, style, colour: `(n,)` log-probabilities, in the order of the config.
    """

    x: float
    y: float
    side: float
    score: float
    concept: Tensor
    style: Tensor
    colour: Tensor


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, width), nn.GroupNorm(GROUPS, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, width, h, w)` -> the same."""
        y = self.conv1(F.silu(self.norm1(x)))
        result: Tensor = x + self.conv2(F.silu(self.norm2(y)))
        return result


def halving(width: int, new: int) -> nn.Module:
    """A convolution that halves both sides, and a norm."""
    return nn.Sequential(nn.Conv2d(width, new, 4, stride=2, padding=1), nn.GroupNorm(GROUPS, new), nn.SiLU())


class Finder(nn.Module):
    """Pixels `(B, 3, H, W)` in [-1, 1] -> `Maps`."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        a, b, c = widths
        self.stem = halving(3, a)
        self.down = nn.ModuleList(halving(m, n) for m, n in ((a, b), (b, c), (c, c)))
        self.blocks = nn.ModuleList(Block(width) for width in (b, c, c))
        self.up = nn.ModuleList(nn.Conv2d(m, n, 1) for m, n in ((c, c), (c, b)))
        self.merged = nn.ModuleList(Block(width) for width in (c, b))
        self.norm, self.head = nn.GroupNorm(GROUPS, b), nn.Conv2d(b, 4, 1)
        assert self.head.bias is not None
        nn.init.constant_(self.head.bias[:1], -math.log(1 / RARE - 1))

    def forward(self, pixels: Tensor) -> Maps:
        """Find things; sides are multiples of 16."""
        x, levels = self.stem(pixels), []
        for down, block in zip(self.down, self.blocks, strict=True):
            x = block(down(x))
            levels.append(x)
        for up, block, level in zip(self.up, self.merged, levels[-2::-1], strict=True):
            x = block(level + F.interpolate(up(x), scale_factor=2.0, mode="nearest"))
        said = self.head(F.silu(self.norm(x)))
        return Maps(said[:, 0], said[:, 1], said[:, 2:])


class Namer(nn.Module):
    """What was cut out `(K, 3, 32, 32)` in [-1, 1] -> `Names`."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        a, b, c = config.namer
        self.trunk = nn.Sequential(halving(3, a), halving(a, b), halving(b, c))
        self.hidden = nn.Linear(c * (CUT // 8) ** 2, config.hidden)
        self.parts = [len(config.concepts), len(config.styles), len(config.colours)]
        self.head = nn.Linear(config.hidden, sum(self.parts))

    def features(self, things: Tensor) -> Tensor:
        """`(K, hidden)`."""
        return F.silu(self.hidden(self.trunk(things).flatten(1)))

    def forward(self, things: Tensor) -> Names:
        """Name things."""
        return Names(*torch.split(self.head(self.features(things)), self.parts, dim=1))


class Judge(nn.Module):
    """Finder and namer."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        self.finder, self.namer = Finder(config.finder), Namer(config)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels `(B, 3, H, W)` in [-1, 1] -> `(B, hidden)` of length 1: what the namer makes of whole pictures."""
        whole = F.interpolate(pixels, (CUT, CUT), mode="bilinear", antialias=True)
        return F.normalize(self.namer.features(whole), dim=1)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> list[list[Detection]]:
        """The things in each picture `(B, 3, H, W)` in [-1, 1], the surest first."""
        rows, places, scores = peaks(self.finder(pixels))
        found: list[list[Detection]] = [[] for _ in pixels]
        if not len(rows):
            return found
        names = self.namer(cut_out(pixels, rows, places))
        logs = [part.log_softmax(1) for part in (names.concept, names.style, names.colour)]
        each = zip(rows.tolist(), places.tolist(), scores.tolist(), *logs, strict=True)
        for row, (x, y, side), score, concept, style, colour in each:
            found[row].append(Detection(x, y, side, score, concept, style, colour))
        return found


def peaks(maps: Maps) -> tuple[Tensor, Tensor, Tensor]:
    """The cells that are likelier centres than their eight neighbours, the surest of each picture first.

    Returns:
        `(K,)`, whose picture; `(K, 3)`, centre and side as in `Detection`; `(K,)`, scores.
    """
    heat = maps.centre.sigmoid()
    count, height, width = heat.shape
    highest = heat * (heat == F.max_pool2d(heat[:, None], 3, stride=1, padding=1)[:, 0])
    scores, cells = highest.flatten(1).topk(min(MOST, height * width), dim=1)
    rows = torch.arange(count, device=heat.device)[:, None].expand_as(cells)[scores >= LEAST]
    cells, scores = cells[scores >= LEAST], scores[scores >= LEAST]
    i, j = cells // width, cells % width
    right, down = maps.offset[rows, :, i, j].unbind(1)
    places = torch.stack([(j + 0.5 + right) / width, (i + 0.5 + down) / height, maps.side[rows, i, j].exp()], dim=1)
    return rows, places, scores


def cut_out(pixels: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """Things, each in a square with a little room around it.

    Args:
        pixels: `(B, 3, H, W)`.
        rows: `(K,)`, whose picture.
        places: `(K, 3)`, centre and side in parts of the picture's width and height.

    Returns:
        `(K, 3, 32, 32)`; what lies outside the picture continues its edge.
    """
    scale = places[:, 2] * ROOM
    turn = torch.zeros(len(rows), 2, 3, device=pixels.device, dtype=pixels.dtype)
    turn[:, 0, 0], turn[:, 1, 1] = scale, scale
    turn[:, :, 2] = places[:, :2] * 2 - 1
    grid = F.affine_grid(turn, [len(rows), 3, CUT, CUT], align_corners=False)
    return F.grid_sample(pixels[rows], grid, padding_mode="border", align_corners=False)
