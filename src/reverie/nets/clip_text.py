"""CLIP's text encoder (Radford et al. 2021), the part that Stable Diffusion conditions on; CLIP's layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.nets.attention import attention


@dataclass(frozen=True)
class ClipTextConfig:
    """The shape of a text encoder. The defaults are CLIP ViT-L/14, the one of Stable Diffusion 1.

    Attributes:
        activation: `quick_gelu` (OpenAI's) or `gelu` (OpenCLIP's).
        projection_width: channels to which the pooled output is projected; 0 where it is not.
    """

    vocab_size: int = 49408
    width: int = 768
    inner_width: int = 3072
    layers: int = 12
    heads: int = 12
    positions: int = 77
    activation: str = "quick_gelu"
    eps: float = 1e-5
    projection_width: int = 0


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)` (Hendrycks & Gimpel 2016), what OpenAI trained CLIP with."""
    return x * torch.sigmoid(1.702 * x)


Vectors: TypeAlias = Sequence[tuple[int, int, Tensor]]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Embeddings(nn.Module):
    """Token plus position."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.positions, config.width)

    def forward(self, ids: Tensor, vectors: Vectors = ()) -> Tensor:
        """`(B, L)` -> `(B, L, width)`; `vectors` stand in for the embeddings of some ids."""
        tokens = self.token_embedding(ids)
        for row, at, instead in vectors:
            tokens = tokens.clone()
            tokens[row, at : at + len(instead)] = instead.to(tokens)
        result: Tensor = tokens + self.position_embedding.weight[: ids.shape[1]]
        return result


class SelfAttention(nn.Module):
    """Multi-head attention with `q_proj`, `k_proj`, `v_proj`, `out_proj`.

    Args:
        causal: whether a position sees those before it alone (text), or every other (patches of a picture).
    """

    def __init__(self, width: int, heads: int, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x (B, L, width)`, `mask (B, L)` of causal ones, False where no position may look -> `(B, L, width)`."""
        batch, length, width = x.shape
        q, k, v = (
            proj(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if not self.causal:
            out = attention(q, k, v)
        elif mask is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            before = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=before & mask[:, None, None, :])
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return result


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.width, config.inner_width)
        self.fc2 = nn.Linear(config.inner_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, L, width)` -> `(B, L, width)`."""
        result: Tensor = self.fc2(self.activation(self.fc1(x)))
        return result


class Layer(nn.Module):
    """One pre-norm transformer layer, of text or of pictures; see `SelfAttention`."""

    def __init__(self, config: ClipTextConfig, *, causal: bool = True) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.width, config.heads, causal=causal)
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, L, width)` -> `(B, L, width)`."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        result: Tensor = x + self.mlp(self.layer_norm2(x))
        return result


class LayerStack(nn.Module):
    """The layers, under the name that the published files give them."""

    def __init__(self, config: ClipTextConfig, *, causal: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, causal=causal) for _ in range(config.layers))


class TextTransformer(nn.Module):
    """Embeddings, layers, final norm."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = LayerStack(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.eps)


class ClipText(nn.Module):
    """`ids -> hidden states`; parameter names as in the files of transformers' `CLIPTextModel`, or of its
    `CLIPTextModelWithProjection` where the config has a projection.
    """

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        projected = config.projection_width
        self.text_projection = nn.Linear(config.width, projected, bias=False) if projected else None

    def forward(
        self,
        ids: Tensor,
        skip: int = 0,
        *,
        vectors: Vectors = (),
        mask: Tensor | None = None,
        final_norm: bool = True,
    ) -> Tensor:
        """Encode token ids.

        Args:
            ids: `(B, L)` int64, L at most `config.positions`.
            skip: how many of the last layers to leave out ("clip skip 2" leaves out one).
            vectors: `(row, position, (k, width))`, what stands in for the embeddings of k ids (textual inversion).
            mask: `(B, L)` bool, False where no position may look; beside the causal mask.
            final_norm: whether the final layer norm follows (in SDXL it does not).

        Returns:
            `(B, L, width)`.
        """
        x = self._through(self.text_model.embeddings(ids, vectors), 0, self.config.layers - skip, mask)
        return self._normed(x) if final_norm else x

    def encode(
        self,
        ids: Tensor,
        skip: int = 0,
        *,
        eos: int,
        vectors: Vectors = (),
        mask: Tensor | None = None,
        final_norm: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Encode token ids, with the pooled output that CLIP compares pictures with.

        Args:
            eos: the id at whose first place a row is pooled.

        Returns:
            What `forward` says, and `(B, projection_width)`, or `(B, width)` without projection: always of the last
            layer, after the final norm.
        """
        layers = self.config.layers
        x = self._through(self.text_model.embeddings(ids, vectors), 0, layers - skip, mask)
        last = self._normed(self._through(x, layers - skip, layers, mask))
        rows = torch.arange(len(ids), device=ids.device)
        pooled = last[rows, (ids == eos).int().argmax(dim=1)]
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return self._normed(x) if final_norm else x, pooled

    def _through(self, x: Tensor, first: int, last: int, mask: Tensor | None) -> Tensor:
        for layer in self.text_model.encoder.layers[first:last]:
            x = layer(x, mask)
        return x

    def _normed(self, x: Tensor) -> Tensor:
        result: Tensor = self.text_model.final_layer_norm(x)
        return result
