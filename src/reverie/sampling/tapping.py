"""Reaching into a network through `Taps`: where it can be tapped, and what taps do there.

The network is seen by the names of its modules alone. A name in a request is short: `mid`, `down.1` (a level),
`down.1.0` (its first transformer), `down.1.0.3` (that one's fourth block), each of them with `.attn1` or `.attn2`, `7`
(the eighth block of a transformer without levels), or a full path.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.errors import RequestError
from reverie.types import AttentionTap, Taps

SELF_ATTENTION = ("attn1", "attn")  # of a U-Net's block, of a diffusion transformer's
BLOCK = re.compile(r"(^|\.)transformer_blocks\.\d+$")
UP_BLOCK = re.compile(r"^up_blocks\.\d+$")


class AttentionLayer(Protocol):
    """What a tap may use of the attention layer that it stands in for (`nets/attention.py: Attention`)."""

    def to_q(self, x: Tensor) -> Tensor:
        """Queries `(B, N, heads * d)`."""

    def to_k(self, x: Tensor) -> Tensor:
        """Keys."""

    def to_v(self, x: Tensor) -> Tensor:
        """Values."""

    def split(self, t: Tensor) -> Tensor:
        """`(B, N, heads * d)` -> `(B, heads, N, d)`."""

    def merged(self, heads: Tensor) -> Tensor:
        """`(B, heads, N, d)` -> `(B, N, width)`, through the output projection."""


def short(path: str) -> str:
    """The short name of a path: `down.1.0.2.attn1` of `down_blocks.1.attentions.0.transformer_blocks.2.attn1`."""
    path = path.replace("attentions.", "").replace("transformer_blocks.", "")
    return path.replace("mid_block", "mid").replace("down_blocks", "down").replace("up_blocks", "up")


@dataclass(frozen=True)
class Layout:
    """Where a network can be tapped.

    Attributes:
        self_attention: paths of its self-attention layers.
        blocks: paths of its transformer blocks.
        up_blocks: paths of a U-Net's up blocks, in the order in which they run.
        channels: width of a U-Net's first level; 0 where there is none.
    """

    self_attention: tuple[str, ...]
    blocks: tuple[str, ...]
    up_blocks: tuple[str, ...]
    channels: int = 0

    @classmethod
    def of(cls, network: nn.Module) -> "Layout":
        """The layout of a U-Net or diffusion transformer, by the names of its modules."""
        paths = [path for path, _ in network.named_modules()]
        first = dict(network.named_parameters()).get("conv_in.weight")
        return cls(
            tuple(path for path in paths if path.split(".")[-1] in SELF_ATTENTION),
            tuple(path for path in paths if BLOCK.search(path)),
            tuple(path for path in paths if UP_BLOCK.search(path)),
            0 if first is None else len(first),
        )

    def attention_at(self, names: str) -> tuple[str, ...]:
        """The self-attention layers that `names` mean; see `chosen`."""
        return chosen(names, self.self_attention, "self-attention layer")

    def blocks_at(self, names: str) -> tuple[str, ...]:
        """The transformer blocks that `names` mean; see `chosen`."""
        return chosen(names, self.blocks, "transformer block")


def chosen(names: str, paths: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """The paths that `names` mean, in the order of the network.

    Args:
        names: one or more, joined by `+`, commas or spaces; each means all paths that lie inside it.

    Raises:
        RequestError: a name that means none; the message lists what there is.
    """
    wanted = re.split(r"[+,\s]+", names.strip())
    for name in wanted:
        if not any(_inside(path, name) for path in paths):
            there = ", ".join(dict.fromkeys(_coarse(path) for path in paths)) or "none"
            raise RequestError(f"no {kind} {name!r} in this network; there are {there}")
    return tuple(path for path in paths if any(_inside(path, name) for name in wanted))


def _inside(path: str, name: str) -> bool:
    """Whether `name` is a beginning of the path, in whole steps; the kind of attention may follow at once."""
    have, want = short(path).split("."), short(name).split(".")
    if want[-1].startswith("attn") and have[-1] == want[-1]:
        have, want = have[:-1], want[:-1]
    return have[: len(want)] == want


def _coarse(path: str) -> str:
    """Short enough to list: level and transformer, without block and kind."""
    return ".".join(part for part in short(path).split(".") if not part.startswith("attn")).removesuffix(".0")


def recording(paths: frozenset[str], maps: dict[str, Tensor]) -> Taps:
    """Taps that change nothing and keep what attention layers look at.

    Args:
        maps: receives, by path, the attention weights of one evaluation `(B, N, M)`, averaged over the heads.

    Raises:
        RequestError: when a layer runs twice, because the picture goes through the network in tiles.
    """

    def tap_of(path: str) -> AttentionTap:
        def tap(module: nn.Module, x: Tensor, context: Tensor | None, usual: Callable[[], Tensor]) -> Tensor:
            if path in maps:
                raise RequestError("guidance by attention maps (sag) does not see tiles: leave out one of the two")
            layer = cast(AttentionLayer, module)
            q, k = layer.split(layer.to_q(x)), layer.split(layer.to_k(x if context is None else context))
            maps[path] = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1).mean(1)
            return usual()

        return tap

    return Taps(attention={path: tap_of(path) for path in paths})


def identity(module: nn.Module, x: Tensor, context: Tensor | None, usual: Callable[[], Tensor]) -> Tensor:
    """Self-attention in which every token sees itself alone: the values as they are (Ahn et al. 2024)."""
    layer = cast(AttentionLayer, module)
    return layer.merged(layer.split(layer.to_v(x)))


def smoothed(sigma: float, height: int, width: int) -> AttentionTap:
    """Self-attention with queries blurred over the picture (Hong 2024, section 3.3); infinite `sigma` is their mean.

    Args:
        sigma: of the Gaussian, in tokens.
        height, width: of the latents; the layer's tokens are a grid that was halved some times.
    """

    def tap(module: nn.Module, x: Tensor, context: Tensor | None, usual: Callable[[], Tensor]) -> Tensor:
        layer = cast(AttentionLayer, module)
        rows, columns = grid(x.shape[1], height, width)
        queries = layer.to_q(x).transpose(1, 2).reshape(len(x), -1, rows, columns)
        queries = blurred(queries, sigma) if sigma < float("inf") else queries.mean((-2, -1), keepdim=True)
        q = queries.expand(-1, -1, rows, columns).flatten(2).transpose(1, 2)
        parts = (layer.split(q), layer.split(layer.to_k(x)), layer.split(layer.to_v(x)))
        return layer.merged(F.scaled_dot_product_attention(*parts))

    return tap


def grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a feature map with so many tokens, halved (upwards) from latents of `height x width`.

    Raises:
        RequestError: there is no such map.
    """
    rows, columns = height, width
    while rows * columns > tokens:
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    if rows * columns != tokens:
        raise RequestError(f"{tokens} tokens are no map of latents of {width} x {height}; guidance cannot place them")
    return rows, columns


def blurred(x: Tensor, sigma: float, reach: int | None = None) -> Tensor:
    """A Gaussian blur of `x (B, C, h, w)`, mirrored at the edges.

    Args:
        reach: pixels to each side; 3 sigma if None. Mirroring limits it to the size less one.
    """
    reach = math.ceil(3 * sigma) if reach is None else reach
    for axis in (-2, -1):
        x = _blurred_along(x, sigma, min(reach, x.shape[axis] - 1), axis)
    return x


def _blurred_along(x: Tensor, sigma: float, reach: int, axis: int) -> Tensor:
    if reach <= 0 or sigma <= 0:
        return x
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device, dtype=torch.float32) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(x.dtype)
    channels = x.shape[1]
    padding = (0, 0, reach, reach) if axis == -2 else (reach, reach, 0, 0)
    shape = (channels, 1, -1, 1) if axis == -2 else (channels, 1, 1, -1)
    padded = F.pad(x, padding, mode="reflect")
    return F.conv2d(padded, kernel.expand(channels, 1, 1, -1).reshape(shape), groups=channels)
