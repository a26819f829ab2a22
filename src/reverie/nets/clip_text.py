"""CLIP's text encoder (Radford et al. 2021), the part that Stable Diffusion conditions on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ClipTextConfig:
    """The shape of a text encoder. The defaults are CLIP ViT-L/14, the one of Stable Diffusion 1.

    Attributes:
        activation: `quick_gelu` (OpenAI's) or `gelu` (OpenCLIP's).
    """

    vocab_size: int = 49408
    width: int = 768
    inner_width: int = 3072
    layers: int = 12
    heads: int = 12
    positions: int = 77
    activation: str = "quick_gelu"
    eps: float = 1e-5


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)` (Hendrycks & Gimpel 2016), what OpenAI trained CLIP with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Embeddings(nn.Module):
    """Token plus position."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.positions, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """`(B, L)` -> `(B, L, width)`."""
        result: Tensor = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        return result


class SelfAttention(nn.Module):
    """Causal multi-head attention with `q_proj`, `k_proj`, `v_proj`, `out_proj`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, L, width)` -> `(B, L, width)`."""
        batch, length, width = x.shape
        q, k, v = (
            proj(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
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
    """One pre-norm transformer layer."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.width, config.heads)
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, L, width)` -> `(B, L, width)`."""
        x = x + self.self_attn(self.layer_norm1(x))
        result: Tensor = x + self.mlp(self.layer_norm2(x))
        return result


class LayerStack(nn.Module):
    """The layers, under the name that the published files give them."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))


class TextTransformer(nn.Module):
    """Embeddings, layers, final norm."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = LayerStack(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.eps)


class ClipText(nn.Module):
    """`ids -> hidden states`; parameter names as in transformers' `CLIPTextModel` files."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def forward(self, ids: Tensor, skip: int = 0) -> Tensor:
        """Encode token ids.

        Args:
            ids: `(B, L)` int64, L at most `config.positions`.
            skip: how many of the last layers to leave out ("clip skip 2" leaves out one).

        Returns:
            `(B, L, width)`, after the final layer norm.
        """
        x = self.text_model.embeddings(ids)
        layers = self.text_model.encoder.layers
        for layer in layers[: len(layers) - skip]:
            x = layer(x)
        result: Tensor = self.text_model.final_layer_norm(x)
        return result
