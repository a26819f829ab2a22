"""T5's encoder (Raffel et al. 2020; version 1.1 with gated GELU, Shazeer 2020), the third one of Stable Diffusion 3.

Parameter names are those of transformers' `T5EncoderModel`.

Precision: the residual sums are float32 whatever the weights are, since the trained activations of T5 XXL outgrow
float16 (65,504) there; attention and projections run in the weights' precision. In float16 the feed-forward's last
product, which outgrows it too, is taken in float32. bfloat16 has float32's range and needs only the float32 sums.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class T5Config:
    """The shape of an encoder. The defaults are T5 v1.1 XXL, the one of Stable Diffusion 3.

    Attributes:
        buckets: how many distances have a position bias; half of them look back, half ahead.
        max_distance: tokens; all distances from there on share one bucket.
    """

    vocab_size: int = 32128
    width: int = 4096
    inner_width: int = 10240
    layers: int = 24
    heads: int = 64
    head_width: int = 64
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


def position_buckets(length: int, buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance between two tokens (section 2.1): exact nearby, logarithmic further away.

    Returns:
        `(length, length)` int64, query by key.
    """
    side = buckets // 2
    exact = side // 2
    places = torch.arange(length)
    offset = places[None, :] - places[:, None]
    distance = offset.abs()
    # In float32 and this order, as transformers has it: a rounding decides where a bucket begins.
    octaves = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (octaves * (side - exact)).long()).clamp(max=side - 1)
    return torch.where(distance < exact, distance, far) + side * (offset > 0)


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019), computed in float32; the answer has the weight's precision."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` -> `(..., width)`."""
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention with a bias for each distance; scores are not divided by the root of the width.

    Args:
        biased: the first layer holds the biases that all layers use.
    """

    def __init__(self, config: T5Config, *, biased: bool) -> None:
        super().__init__()
        inner = config.heads * config.head_width
        self.config = config
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)
        self.relative_attention_bias = nn.Embedding(config.buckets, config.heads) if biased else None

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`x (B, L, width)`, `bias (1, heads, L, L)` -> `(B, L, width)`."""
        heads = (self.config.heads, self.config.head_width)
        q, k, v = (proj(x).unflatten(-1, heads).transpose(1, 2) for proj in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        result: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return result


class GatedFeedForward(nn.Module):
    """`wo(gelu(wi_0 x) * wi_1 x)`, GELU in its tanh form."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.width, config.inner_width, bias=False)
        self.wi_1 = nn.Linear(config.width, config.inner_width, bias=False)
        self.wo = nn.Linear(config.inner_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, L, width)` -> `(B, L, width)`; float32 for float16 (see the top of this file)."""
        hidden = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        if hidden.dtype == torch.float16:
            return F.linear(hidden.float(), self.wo.weight.float())
        result: Tensor = self.wo(hidden)
        return result


class AttentionLayer(nn.Module):
    """Norm, attention, sum."""

    def __init__(self, config: T5Config, *, biased: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config, biased=biased)
        self.layer_norm = RMSNorm(config.width, config.eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`x (B, L, width)` float32, `bias (1, heads, L, L)` -> `(B, L, width)` float32."""
        result: Tensor = x + self.SelfAttention(self.layer_norm(x), bias)
        return result


class FeedForwardLayer(nn.Module):
    """Norm, feed-forward, sum."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = GatedFeedForward(config)
        self.layer_norm = RMSNorm(config.width, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, L, width)` float32 -> `(B, L, width)` float32."""
        result: Tensor = x + self.DenseReluDense(self.layer_norm(x))
        return result


class Block(nn.Module):
    """Attention, then feed-forward, under the names that the published files give them."""

    def __init__(self, config: T5Config, index: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config, biased=index == 0), FeedForwardLayer(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`x (B, L, width)` float32, `bias (1, heads, L, L)` -> `(B, L, width)` float32."""
        result: Tensor = self.layer[1](self.layer[0](x, bias))
        return result


class Stack(nn.Module):
    """The blocks and the last norm."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.block = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.final_layer_norm = RMSNorm(config.width, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings `(B, L, width)` -> `(B, L, width)` in the weights' precision."""
        bias = self._bias(x.shape[1], x.device)
        x = x.float()
        for block in self.block:
            x = block(x, bias)
        result: Tensor = self.final_layer_norm(x)
        return result

    def _bias(self, length: int, device: torch.device) -> Tensor:
        """`(1, heads, length, length)`, what each pair of places adds to the score."""
        biases = self.get_submodule("block.0.layer.0.SelfAttention.relative_attention_bias")
        table: Tensor = biases(position_buckets(length, self.config.buckets, self.config.max_distance).to(device))
        return table.permute(2, 0, 1)[None]


class T5Encoder(nn.Module):
    """`ids -> hidden states`.

    The table of tokens is one parameter, `shared.weight`; some files hold it again as `encoder.embed_tokens.weight`.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.width)
        self.encoder = Stack(config)

    def forward(self, ids: Tensor) -> Tensor:
        """Encode token ids.

        Args:
            ids: `(B, L)` int64, any L. Padding is read like any other token, as Stable Diffusion 3 was trained.

        Returns:
            `(B, L, width)`, after the last norm.
        """
        result: Tensor = self.encoder(self.shared(ids))
        return result
