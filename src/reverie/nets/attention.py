"""Attention and the transformer blocks of the U-Net."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.types import Taps

MOST_SCORES = 2**30  # of queries and keys at a time; kernels that keep them all would need 4 GiB in float32


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v`, all `(B, heads, N, d)`; of very large maps some queries at a time."""
    rows = max(MOST_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]), 1)
    if q.shape[2] <= rows:
        return F.scaled_dot_product_attention(q, k, v)
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in torch.split(q, rows, dim=2)], dim=2)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017), `to_q`, `to_k`, `to_v` and `to_out.0` as diffusers names them.

    Args:
        width: channels of the queries and of the output.
        heads: number of heads; divides `width`.
        context_width: channels of the keys' and values' source; None for self-attention.
        qkv_bias: whether the three projections have a bias (the VAE's do, the U-Net's do not).

    Attributes:
        path: the name of this layer in its network, by which it is tapped; set by the network.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None, *, qkv_bias: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide {width} channels")
        self.heads = heads
        self.path = ""
        source = context_width or width
        self.to_q = nn.Linear(width, width, bias=qkv_bias)
        self.to_k = nn.Linear(source, width, bias=qkv_bias)
        self.to_v = nn.Linear(source, width, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor | None = None, taps: Taps | None = None) -> Tensor:
        """`x (B, N, width)`, `context (B, M, context_width)` -> `(B, N, width)`."""
        tap = taps.attention.get(self.path) if taps else None
        return self._attend(x, context) if tap is None else tap(self, x, context, lambda: self._attend(x, context))

    def _attend(self, x: Tensor, context: Tensor | None) -> Tensor:
        source = x if context is None else context
        q, k, v = (self.split(t) for t in (self.to_q(x), self.to_k(source), self.to_v(source)))
        return self.merged(attention(q, k, v))

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

    def forward(self, x: Tensor, context: Tensor, taps: Taps | None = None) -> Tensor:
        """`x (B, N, width)`, `context (B, M, context_width)` -> `(B, N, width)`."""
        if taps and self.path in taps.bypass:
            return x
        x = x + self._self_attention(x, context, taps)
        x = x + self.attn2(self.norm2(x), context, taps)
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
        """`x (B, width, h, w)`, `context (B, M, context_width)` -> `(B, width, h, w)`."""
        y = self.norm(x)
        if self.linear_projection:
            y = self.proj_in(y.flatten(2).transpose(1, 2))
        else:
            y = self.proj_in(y).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            y = block(y, context, taps)
        if self.linear_projection:
            y = self.proj_out(y).transpose(1, 2).reshape(x.shape)
        else:
            y = self.proj_out(y.transpose(1, 2).reshape(x.shape))
        result: Tensor = x + y
        return result
