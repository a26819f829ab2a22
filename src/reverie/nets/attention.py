"""Attention and the transformer blocks of the U-Net."""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.types import Taps

MOST_SCORES = 2**30  # of queries and keys at a time; kernels that keep them all would need 4 GiB in float32
BLOCK_SCORES = 2**23  # of a block of queries: 32 MiB in float32

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(q, k, v) -> softmax(q k^T / sqrt(d)) v`, all `(B, heads, N, d)`."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v`, all `(B, heads, N, d)`; of very large maps some queries at a time."""
    rows = max(MOST_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]), 1)
    if q.shape[2] <= rows:
        return F.scaled_dot_product_attention(q, k, v)
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in torch.split(q, rows, dim=2)], dim=2)


def attention_by_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as `attention`, by two matrix products for each block of queries, which reach the matrix units of a CPU.

    Softmax is in float32. Of half types the scores are rounded before and after it, as the products take and give them.
    """
    rows = max(BLOCK_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]), 1)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    keys, values, scale = flat[1].transpose(1, 2), flat[2], q.shape[-1] ** -0.5
    found = [_of_block(part, keys, values, scale) for part in torch.split(flat[0], rows, dim=1)]
    return torch.cat(found, dim=1).view(q.shape)


def _of_block(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """`queries (B, N, d)`, `keys (B, d, M)`, `values (B, M, d)` -> `(B, N, d)`."""
    scores = torch.baddbmm(queries.new_zeros(1), queries, keys, beta=0, alpha=scale)
    shares = scores.softmax(-1, dtype=torch.float32)
    return torch.bmm(shares.to(values.dtype), values)


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
    ) -> Tensor:
        """`x (B, N, width)`, `context (B, M, context_width)` -> `(B, N, width)`.

        Args:
            known: `keys_values` of the context, where they are there already.
        """
        tap = taps.attention.get(self.path) if taps else None

        def usual() -> Tensor:
            k, v = known or self._seen(x, context, taps)
            return self.merged(self.attend(self.split(self.to_q(x)), k, v))

        return usual() if tap is None else tap(self, x, context, usual)

    def _seen(self, x: Tensor, context: Tensor | None, taps: Taps | None) -> tuple[Tensor, Tensor]:
        if context is None or taps is None or taps.prompt is None:
            return self.keys_values(x if context is None else context)
        return taps.prompt(self, context)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, M, context_width)` -> keys and values `(B, heads, M, d)`."""
        return self.split(self.to_k(source)), self.split(self.to_v(source))

    def merged(self, heads: Tensor) -> Tensor:
        """What every head found `(B, heads, N, d)`, through the output projection: `(B, N, width)`."""
        result: Tensor = self.to_out[0](heads.transpose(1, 2).flatten(2))
        return result

    def split(self, t: Tensor) -> Tensor:
        """`(B, N, heads * d)` -> `(B, heads, N, d)`."""
        batch, length, width = t.shape
        return t.view(batch, length, self.heads, width // self.heads).transpose(1, 2)


class GEGLU(nn.Module):
    """Gated GELU (Shazeer 2020): `h * gelu(g)` with `h, g` from one projection."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` -> `(..., inner)`."""
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        result: Tensor = hidden * F.gelu(gate)
        return result


class FeedForward(nn.Module):
    """`net.0` GEGLU, `net.2` linear; index 1 is where diffusers has its dropout."""

    def __init__(self, width: int, factor: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, factor * width), nn.Identity(), nn.Linear(factor * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` -> `(..., width)`."""
        result: Tensor = self.net(x)
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
        x = each(x + self._self_attention(x, context, taps), len(context))
        x = x + self.attn2(self.norm2(x), context, taps, known)
        result: Tensor = x + self.ff(self.norm3(x))
        return result

    def _self_attention(self, x: Tensor, context: Tensor, taps: Taps | None) -> Tensor:
        result: Tensor
        y, seen = self.norm1(x), context if self.cross_only else None
        if taps and self.path in taps.merging:
            merge, unmerge = taps.merging[self.path](x)
            result = unmerge(self.attn1(merge(y), seen, taps))
        else:
            result = self.attn1(y, seen, taps)
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
            y = self.proj_out(y).transpose(1, 2).reshape(x.shape)
        else:
            y = self.proj_out(y.transpose(1, 2).reshape(x.shape))
        result: Tensor = x + y
        return result
