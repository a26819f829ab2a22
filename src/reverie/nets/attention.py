"""Attention and the transformer blocks of the U-Net."""

from collections.abc import Callable
from math import prod
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.nets.blocks import plus
from reverie.types import Taps

MOST_SCORES = 2**30  # of queries and keys at a time; kernels that keep them all would need 4 GiB in float32
BLOCK_BYTES = 2**22  # of the scores of a block: what a processor's cache holds
LANES = 16  # numbers that a product adds at once; values of 40 numbers take twice the time of 48

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(q, k, v) -> softmax(q k^T / sqrt(d)) v`, all `(B, heads, N, d)`."""

Layer: TypeAlias = Callable[[Tensor], Tensor]

Gated: TypeAlias = Callable[[Layer, Tensor], Tensor]
"""`(projection, x) -> h * gelu(g)`; see `gated`."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v`, all `(B, heads, N, d)`; of very large maps some queries at a time."""
    rows = max(MOST_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]), 1)
    if q.shape[2] <= rows:
        return F.scaled_dot_product_attention(q, k, v)
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in torch.split(q, rows, dim=2)], dim=2)


def attention_by_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as `attention`, by two matrix products for each block of queries, which reach the matrix units of a CPU.

    Some heads or some queries of one head at a time, so that their scores stay in the processor's cache between the
    products. Of half types the scores are rounded before and after softmax, which itself is in float32. Without
    gradients.
    """
    (count, heads, length, width), keys = q.shape, k.shape[2]
    most = BLOCK_BYTES // q.itemsize
    together, rows = max(min(most // (length * keys), heads), 1), max(min(most // keys, length), 1)
    made = q.new_empty(count, length, heads, width)
    room = q.new_empty(together * rows * keys)
    for number in range(count):
        for first in range(0, heads, together):
            some = slice(first, first + together)
            found = made[number, :, some].transpose(0, 1)
            _of_heads(q[number, some], k[number, some], v[number, some], found, rows, room)
    return made.transpose(1, 2)


def _of_heads(q: Tensor, k: Tensor, v: Tensor, made: Tensor, rows: int, room: Tensor) -> None:
    """Some heads `(heads, N, d)`, so many queries at a time, into `made`; `room` is for the scores."""
    width, scale, nothing = q.shape[-1], q.shape[-1] ** -0.5, q.new_zeros(1)
    keys, values = k.transpose(1, 2).contiguous(), F.pad(v, (0, -width % LANES)).contiguous()
    for queries, found in zip(torch.split(q.contiguous(), rows, 1), torch.split(made, rows, 1), strict=True):
        shape = *queries.shape[:2], k.shape[1]
        scores = room[: prod(shape)].view(shape)
        torch.baddbmm(nothing, queries, keys, beta=0, alpha=scale, out=scores)
        found.copy_(torch.bmm(torch.softmax(scores, -1, out=scores), values)[..., :width])


ATTENTION: dict[str, Attend] = {"fused": attention, "blocks": attention_by_blocks}
"""Ways to compute attention, by name; the usual one first."""


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017), `to_q`, `to_k`, `to_v` and `to_out.0` as diffusers names them.

    Args:
        width: channels of the queries and of the output.
        heads: number of heads; divides `width`.
        context_width: channels of the keys' and values' source; None for self-attention.
        qkv_bias: whether the three projections have a bias (the VAE's do, the U-Net's do not).

    Attributes:
        path: the name of this layer in its network, by which it is tapped; set by the network.
        attend: how attention is computed; forms of a network have another (`nets/ways.py`).

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None, *, qkv_bias: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide {width} channels")
        self.heads = heads
        self.path = ""
        self.attend: Attend = attention
        source = context_width or width
        self.to_q = nn.Linear(width, width, bias=qkv_bias)
        self.to_k = nn.Linear(source, width, bias=qkv_bias)
        self.to_v = nn.Linear(source, width, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        taps: Taps | None = None,
        known: tuple[Tensor, Tensor] | None = None,
        to: Tensor | None = None,
    ) -> Tensor:
        """`x (B, N, width)`, `context (B, M, context_width)` -> `(B, N, width)`.

        Args:
            known: `keys_values` of the context, where they are there already.
            to: what the answer is added to.
        """
        tap = taps.attention.get(self.path) if taps else None

        def usual(to: Tensor | None = None) -> Tensor:
            k, v = known or self._seen(x, context, taps)
            return self.merged(self.attend(self.split(self.to_q(x)), k, v), to)

        if tap is None:
            return usual(to)
        found = tap(self, x, context, usual)
        return found if to is None else to + found

    def _seen(self, x: Tensor, context: Tensor | None, taps: Taps | None) -> tuple[Tensor, Tensor]:
        if context is None or taps is None or taps.prompt is None:
            return self.keys_values(x if context is None else context)
        return taps.prompt(self, context)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, M, context_width)` -> keys and values `(B, heads, M, d)`."""
        return self.split(self.to_k(source)), self.split(self.to_v(source))

    def merged(self, heads: Tensor, to: Tensor | None = None) -> Tensor:
        """What every head found `(B, heads, N, d)`, through the output projection: `(B, N, width)`.

        Args:
            to: what that is added to.
        """
        layer, found = self.to_out[0], heads.transpose(1, 2).flatten(2)
        result: Tensor = layer(found) if to is None else plus(layer, found, to)
        return result

    def split(self, t: Tensor) -> Tensor:
        """`(B, N, heads * d)` -> `(B, heads, N, d)`."""
        batch, length, width = t.shape
        return t.view(batch, length, self.heads, width // self.heads).transpose(1, 2)


def gated(layer: Layer, x: Tensor) -> Tensor:
    """`h * gelu(g)` with `h, g` from one projection `(..., in)` -> `(..., 2 * inner)`: `(..., inner)`."""
    hidden, gate = layer(x).chunk(2, dim=-1)
    result: Tensor = hidden * F.gelu(gate)
    return result


class GEGLU(nn.Module):
    """Gated GELU (Shazeer 2020).

    Attributes:
        gated: how it is computed; forms of a network have another (`nets/ways.py`).
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)
        self.gated: Gated = gated

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` -> `(..., inner)`."""
        return self.gated(self.proj, x)


class FeedForward(nn.Module):
    """`net.0` GEGLU, `net.2` linear; index 1 is where diffusers has its dropout."""

    def __init__(self, width: int, factor: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, factor * width), nn.Identity(), nn.Linear(factor * width, width))

    def forward(self, x: Tensor, to: Tensor | None = None) -> Tensor:
        """`(..., width)` -> `(..., width)`.

        Args:
            to: what the answer is added to.
        """
        last = self.net[2]
        hidden = self.net[1](self.net[0](x))
        result: Tensor = last(hidden) if to is None else plus(last, hidden, to)
        return result


def each(x: Tensor, rows: int) -> Tensor:
    """`x (B, ...)` once for every one of the conditions that share it (`Taps.copies`): `(rows, ...)`."""
    return x if len(x) == rows else x.repeat(rows // len(x), *[1] * (x.ndim - 1))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each on the normalised input and added.

    Args:
        cross_only: the first attention looks at the prompt, too (the x4 upscaler's large maps).
    """

    def __init__(self, width: int, heads: int, context_width: int, *, cross_only: bool = False) -> None:
        super().__init__()
        self.path = ""
        self.cross_only = cross_only
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, context_width if cross_only else None)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        taps: Taps | None = None,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`x (B or fewer, N, width)`, `context (B, M, context_width)` -> `(B, N, width)`.

        Args:
            x: fewer rows than contexts where several contexts share a row (`Taps.copies`).
            known: `attn2.keys_values` of the context, where they are there already.
        """
        if taps and self.path in taps.bypass:
            return x
        x = each(x, len(context)) if self.cross_only else x
        x = each(self._seen_by_itself(x, context, taps), len(context))
        x = self.attn2(self.norm2(x), context, taps, known, to=x)
        result: Tensor = self.ff(self.norm3(x), to=x)
        return result

    def _seen_by_itself(self, x: Tensor, context: Tensor, taps: Taps | None) -> Tensor:
        """`x` and what self-attention adds to it."""
        result: Tensor
        y, seen = self.norm1(x), context if self.cross_only else None
        if taps and self.path in taps.merging:
            merge, unmerge = taps.merging[self.path](x)
            result = x + unmerge(self.attn1(merge(y), seen, taps))
        else:
            result = self.attn1(y, seen, taps, to=x)
        return result


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (Rombach et al. 2022, appendix E.2.1).

    Args:
        depth: number of transformer blocks.
        linear_projection: `proj_in` and `proj_out` are linear (SD 2, SDXL) instead of 1x1 convolutions (SD 1).
        cross_only: see `TransformerBlock`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int,
        *,
        depth: int = 1,
        groups: int = 32,
        linear_projection: bool = False,
        cross_only: bool = False,
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear_projection else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, context_width, cross_only=cross_only) for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, width) if linear_projection else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor, taps: Taps | None = None) -> Tensor:
        """`x (B or fewer, width, h, w)`, `context (B, M, context_width)` -> `(B, width, h, w)`."""
        y = self.norm(x)
        if self.linear_projection:
            y = self.proj_in(y.flatten(2).transpose(1, 2))
        else:
            y = self.proj_in(y).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            y = block(y, context, taps)
        x = each(x, len(y))
        if self.linear_projection:
            tokens = plus(self.proj_out, y, x.flatten(2).transpose(1, 2))
            return tokens.transpose(1, 2).reshape(x.shape)
        return plus(self.proj_out, y.transpose(1, 2).reshape(x.shape), x)
