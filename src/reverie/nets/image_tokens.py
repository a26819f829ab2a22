"""What an IP-Adapter adds to a network (Ye et al. 2023): pictures as tokens, and keys and values of them.

Parameter names are those of the published files (tencent-ailab/IP-Adapter), `image_proj.*` and `ip_adapter.N.*`.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from reverie.nets.attention import attention

Kind: TypeAlias = Literal["embedding", "states", "resampler", "face", "face_resampler"]

HEAD_WIDTH = 64  # of the resamplers: IP-Adapter `resampler.py`, `dim_head`


@dataclass(frozen=True)
class TokensConfig:
    """How a picture becomes tokens.

    Attributes:
        kind: `embedding`: of the picture's one embedding (plain, light); `states`: one token of each of its states
            (full face); `resampler`: learnt queries look at its states (plus, plus face); `face`: of a face's
            embedding (FaceID); `face_resampler`: that, looking at the picture's states (FaceID plus).
        source: channels of what the image encoder says; 0 for `face`.
        width: channels of the tokens, those of the prompt.
        tokens: how many a picture becomes; of `states`, as many as there are.
        inner: channels inside the resampler, or of the first layer of `face` and `face_resampler`.
        feed: channels inside the resampler's feed-forward layers.
        layers, heads: of the resampler.
        face: channels of a face's embedding; 512 as ArcFace has them.
        shortcut: tokens of the face are added to what the resampler says (FaceID plus v2).
    """

    kind: Kind
    source: int
    width: int
    tokens: int = 4
    inner: int = 0
    feed: int = 0
    layers: int = 4
    heads: int = 12
    face: int = 512
    shortcut: bool = False

    @property
    def wants_states(self) -> bool:
        """Whether it reads the image encoder's states, of the layer before the last, and not its embedding."""
        return self.kind in {"states", "resampler", "face_resampler"}

    @property
    def wants_faces(self) -> bool:
        """Whether it reads embeddings of faces."""
        return self.kind in {"face", "face_resampler"}


class EmbeddingTokens(nn.Module):
    """Some tokens of one embedding."""

    def __init__(self, config: TokensConfig) -> None:
        super().__init__()
        self.tokens = config.tokens
        self.proj = nn.Linear(config.source, config.tokens * config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, source)` -> `(B, tokens, width)`."""
        result: Tensor = self.norm(self.proj(x).unflatten(-1, (self.tokens, -1)))
        return result


class StateTokens(nn.Module):
    """One token of each state."""

    def __init__(self, config: TokensConfig) -> None:
        super().__init__()
        source, width = config.source, config.width
        self.proj = nn.Sequential(nn.Linear(source, source), nn.GELU(), nn.Linear(source, width), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, source)` -> `(B, N, width)`."""
        result: Tensor = self.proj(x)
        return result


class FaceTokens(nn.Module):
    """Some tokens of the embedding of a face."""

    def __init__(self, config: TokensConfig) -> None:
        super().__init__()
        self.tokens = config.tokens
        self.proj = nn.Sequential(
            nn.Linear(config.face, config.inner), nn.GELU(), nn.Linear(config.inner, config.tokens * config.width)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, faces: Tensor) -> Tensor:
        """`(B, face)` -> `(B, tokens, width)`."""
        result: Tensor = self.norm(self.proj(faces).unflatten(-1, (self.tokens, -1)))
        return result


class PerceiverAttention(nn.Module):
    """Queries look at states and at one another (Flamingo, Alayrac et al. 2022)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * HEAD_WIDTH
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, queries: Tensor) -> Tensor:
        """`x (B, N, width)`, `queries (B, T, width)` -> `(B, T, width)`."""
        queries = self.norm2(queries)
        keys, values = self.to_kv(torch.cat([self.norm1(x), queries], dim=1)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(queries), keys, values))
        result: Tensor = self.to_out(attention(q, k, v).transpose(1, 2).flatten(2))
        return result


class PerceiverLayer(nn.ModuleList):
    """Attention, then a feed-forward layer; each added to the queries."""

    def __init__(self, config: TokensConfig, width: int) -> None:
        feed = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, config.feed, bias=False),
            nn.GELU(),
            nn.Linear(config.feed, width, bias=False),
        )
        super().__init__([PerceiverAttention(width, config.heads), feed])

    def forward(self, x: Tensor, queries: Tensor) -> Tensor:
        """`x (B, N, width)`, `queries (B, T, width)` -> `(B, T, width)`."""
        look, feed = self
        queries = queries + look(x, queries)
        result: Tensor = queries + feed(queries)
        return result


class Perceiver(nn.Module):
    """Queries that look at states, layer by layer.

    Args:
        width: channels of the queries.
    """

    def __init__(self, config: TokensConfig, width: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(config.source, width)
        self.layers = nn.ModuleList(PerceiverLayer(config, width) for _ in range(config.layers))
        self.proj_out = nn.Linear(width, config.width)
        self.norm_out = nn.LayerNorm(config.width)

    def resampled(self, x: Tensor, queries: Tensor) -> Tensor:
        """`x (B, N, source)`, `queries (B, T, width of queries)` -> `(B, T, width)`."""
        x = self.proj_in(x)
        for layer in self.layers:
            queries = layer(x, queries)
        result: Tensor = self.norm_out(self.proj_out(queries))
        return result


class Resampler(Perceiver):
    """Learnt queries that look at states."""

    def __init__(self, config: TokensConfig) -> None:
        super().__init__(config, config.inner)
        self.latents = nn.Parameter(torch.zeros(1, config.tokens, config.inner))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, source)` -> `(B, tokens, width)`."""
        return self.resampled(x, self.latents.expand(len(x), -1, -1))


class FaceResampler(FaceTokens):
    """Tokens of a face that look at the states of its picture."""

    def __init__(self, config: TokensConfig) -> None:
        super().__init__(config)
        self.shortcut = config.shortcut
        self.perceiver_resampler = Perceiver(config, config.width)

    def looking(self, faces: Tensor, x: Tensor) -> Tensor:
        """`faces (B, face)`, `x (B, N, source)` -> `(B, tokens, width)`."""
        tokens = self(faces)
        seen = self.perceiver_resampler.resampled(x, tokens)
        return tokens + seen if self.shortcut else seen


Tokens: TypeAlias = EmbeddingTokens | StateTokens | FaceTokens | Resampler
KINDS: dict[Kind, type[Tokens]] = {
    "embedding": EmbeddingTokens, "states": StateTokens, "resampler": Resampler, "face": FaceTokens,
    "face_resampler": FaceResampler,
}  # fmt: skip


class KeysValues(nn.Module):
    """Keys and values of a picture's tokens, for one cross-attention layer.

    Args:
        source: channels of the tokens.
        width: channels of the layer.
    """

    def __init__(self, source: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(source, width, bias=False)
        self.to_v_ip = nn.Linear(source, width, bias=False)


class ImagePromptNetwork(nn.Module):
    """All of an IP-Adapter.

    Args:
        widths: channels of each cross-attention layer, by its number in the file.
    """

    def __init__(self, config: TokensConfig, widths: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        self.image_proj = KINDS[config.kind](config)
        self.ip_adapter = nn.ModuleDict({number: KeysValues(config.width, width) for number, width in widths.items()})

    def forward(self, seen: Tensor | None, faces: Tensor | None = None) -> Tensor:
        """The tokens of pictures.

        Args:
            seen: `(B, source)` the image encoder's embeddings, or `(B, N, source)` its states where
                `config.wants_states`.
            faces: `(B, face)`, embeddings of the faces, where `config.wants_faces`.

        Returns:
            `(B, tokens, width)`.
        """
        project = self.image_proj
        if isinstance(project, FaceResampler):
            assert seen is not None and faces is not None
            return project.looking(faces, seen)
        result: Tensor = project(faces if self.config.wants_faces else seen)
        return result
