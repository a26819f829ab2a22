"""The multimodal diffusion transformer of Stable Diffusion 3 and 3.5 (MMDiT; Esser et al. 2024, section 4).

Picture and text are two rows of tokens with weights of their own that meet in every attention. Timestep and pooled
prompt modulate each block (DiT's adaLN-Zero; Peebles & Xie 2023). Parameter names are those of diffusers'
`SD3Transformer2DModel`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.errors import RequestError
from reverie.nets.attention import Attend, attention
from reverie.nets.blocks import TimestepEmbedding, timestep_embedding
from reverie.types import BeyondTap, Taps

NORM_EPS = 1e-6  # of every norm; DiT, sd3-ref mmdit.py
TIME_WIDTH = 256  # of the sines and cosines of the timestep; DiT `frequency_embedding_size`


@dataclass(frozen=True)
class MMDiTConfig:
    """The shape of a transformer. The defaults are Stable Diffusion 3 medium.

    Attributes:
        context_width: channels of the encoded prompt.
        vector_width: channels of the pooled prompt (CLIP-L's 768 and CLIP-G's 1280).
        positions: side of the square of patches that have a position; smaller pictures use its middle.
        base_positions: side of the training picture in patches (1024 pixels), to which positions are scaled.
        qk_norm: whether queries and keys are normalised (3.5).
        dual_attention: indices of the blocks with a second attention among the picture's tokens alone (3.5 medium).
    """

    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2
    layers: int = 24
    heads: int = 24
    head_width: int = 64
    context_width: int = 4096
    vector_width: int = 2048
    positions: int = 192
    base_positions: int = 64
    qk_norm: bool = False
    dual_attention: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_width


SD3_MEDIUM = MMDiTConfig()
SD35_MEDIUM = MMDiTConfig(positions=384, qk_norm=True, dual_attention=tuple(range(13)))
SD35_LARGE = MMDiTConfig(layers=38, heads=38, qk_norm=True)


def position_embedding(width: int, side: int, base: int) -> Tensor:
    """Sines and cosines of the column (first half) and of the row, at geometric frequencies (DiT, MAE).

    Args:
        width: channels; a multiple of 4.
        side: positions along each side.
        base: the range that the positions are scaled to.

    Returns:
        `(1, side * side, width)` float32, row by row.
    """
    quarter = width // 4
    frequencies = 1.0 / 10000.0 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    places = torch.arange(side, dtype=torch.float32) / (side / base)
    angles = torch.outer(places.double(), frequencies)
    along = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    columns, rows = along[None].expand(side, side, -1), along[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None]


class PatchEmbedding(nn.Module):
    """Latents to tokens: one for each patch, plus where it is."""

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.side, self.patch_size = config.positions, config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch_size, stride=config.patch_size)
        positions = position_embedding(config.width, config.positions, config.base_positions)
        self.register_buffer("pos_embed", positions)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, N, width)`, row by row.

        Raises:
            RequestError: `h` or `w` is no multiple of the patch size, or there are more patches than positions.
        """
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        result: Tensor = (tokens + self._cropped(*x.shape[-2:])).to(x.dtype)
        return result

    def _cropped(self, height: int, width: int) -> Tensor:
        """The middle of the grid of positions, `(N, width)`."""
        if height % self.patch_size or width % self.patch_size:
            raise RequestError(
                f"latents of {width} x {height} do not divide into patches of {self.patch_size} x {self.patch_size}: "
                "Stable Diffusion 3 draws widths and heights that are multiples of 16 pixels"
            )
        rows, columns = height // self.patch_size, width // self.patch_size
        if max(rows, columns) > self.side:
            raise RequestError(
                f"latents of {width} x {height} are too large: this model has positions for "
                f"{self.side * self.patch_size} along each side"
            )
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        grid = self.pos_embed.view(self.side, self.side, -1)
        return grid[top : top + rows, left : left + columns].flatten(0, 1)


class Conditioning(nn.Module):
    """Timestep and pooled prompt in one vector, which modulates every block."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME_WIDTH, config.width)
        self.text_embedder = TimestepEmbedding(config.vector_width, config.width)

    def forward(self, timesteps: Tensor, vector: Tensor) -> Tensor:
        """`timesteps (B,)`, `vector (B, vector_width)` -> `(B, width)`."""
        time = timestep_embedding(timesteps, TIME_WIDTH).to(vector.dtype)
        result: Tensor = self.timestep_embedder(time) + self.text_embedder(vector)
        return result


class Modulation(nn.Module):
    """The shifts, scales and gates of a block, all from the conditioning (adaLN)."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        """`(B, width)` -> `count` times `(B, 1, width)`."""
        result: Tensor = self.linear(F.silu(conditioning))[:, None]
        return result.chunk(self.count, dim=-1)


def normalised(x: Tensor) -> Tensor:
    """Layer norm without weights of its own: the modulation brings them."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x (B, N, width)` scaled about 1 and shifted, the same for all tokens."""
    return x * (1 + scale) + shift


class PictureProjections(nn.Module):
    """What both attentions have: queries, keys, values and output of the picture's tokens.

    Attributes:
        path: the name of this layer in its network, by which it is tapped; set by the network.
        attend: how attention is computed; forms of a network have another (`nets/ways.py`).
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.path = ""
        self.attend: Attend = attention
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q, self.norm_k = _head_norm(config), _head_norm(config)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(B, N, width)` -> queries, keys and values `(B, heads, N, head_width)`."""
        q, k, v = (self.split(t) for t in (self.to_q(x), self.to_k(x), self.to_v(x)))
        return self.norm_q(q), self.norm_k(k), v

    def split(self, t: Tensor) -> Tensor:
        """`(B, N, width)` -> `(B, heads, N, head_width)`."""
        batch, length, width = t.shape
        return t.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

    def merged(self, heads: Tensor) -> Tensor:
        """What every head found `(B, heads, N, head_width)`, through the output projection: `(B, N, width)`."""
        result: Tensor = self.to_out[0](heads.transpose(1, 2).flatten(2))
        return result

    def tapped(self, x: Tensor, text: Tensor | None, usual: Tensor, taps: Taps | None) -> Tensor:
        """What the picture's tokens gain: `usual (B, N, width)`, or what a tap of this layer says instead."""
        tap = taps.attention.get(self.path) if taps else None
        return usual if tap is None else tap(self, x, text, lambda: usual)


class PictureAttention(PictureProjections):
    """Attention among the picture's tokens alone."""

    def forward(self, x: Tensor, taps: Taps | None = None) -> Tensor:
        """`(B, N, width)` -> `(B, N, width)`."""
        seen = self.attend(*self.project(x))
        return self.tapped(x, None, self.merged(seen), taps)


class JointAttention(PictureProjections):
    """One attention over the tokens of picture and text together, each with projections of their own (figure 2b).

    Args:
        last: in the last block nobody reads the text any more, so that it has no output.
    """

    def __init__(self, config: MMDiTConfig, *, last: bool) -> None:
        super().__init__(config)
        width = config.width
        self.add_q_proj = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(width, width)
        self.add_v_proj = nn.Linear(width, width)
        self.to_add_out = nn.Identity() if last else nn.Linear(width, width)
        self.norm_added_q, self.norm_added_k = _head_norm(config), _head_norm(config)

    def project_text(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(B, L, width)` -> queries, keys and values `(B, heads, L, head_width)`."""
        projected = (self.add_q_proj(text), self.add_k_proj(text), self.add_v_proj(text))
        q, k, v = (self.split(t) for t in projected)
        return self.norm_added_q(q), self.norm_added_k(k), v

    def forward(self, x: Tensor, text: Tensor, taps: Taps | None = None) -> tuple[Tensor, Tensor]:
        """`x (B, N, width)`, `text (B, L, width)` -> what each of them gains, in the same shapes.

        A tap answers for the picture's tokens alone; what the text gains stays as it is.
        """
        pairs = zip(self.project(x), self.project_text(text), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in pairs)
        seen = self.attend(q, k, v)
        count = x.shape[1]
        read: Tensor = self.to_add_out(seen[:, :, count:].transpose(1, 2).flatten(2))
        return self.tapped(x, text, self.merged(seen[:, :, :count]), taps), read


class GeluProjection(nn.Module):
    """Linear and GELU in its tanh form."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` -> `(..., inner)`."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """`net.0` GELU, `net.2` linear; index 1 is where diffusers has its dropout."""

    def __init__(self, width: int, factor: int = 4) -> None:
        super().__init__()
        inner = factor * width
        self.net = nn.Sequential(GeluProjection(width, inner), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` -> `(..., width)`."""
        result: Tensor = self.net(x)
        return result


class JointBlock(nn.Module):
    """Attention and feed-forward of both rows of tokens (figure 2b).

    Args:
        index: which block; the config says which have a second attention, and the last gives back no text.
    """

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self.path = ""
        width = config.width
        last, dual = index == config.layers - 1, index in config.dual_attention
        self.norm1 = Modulation(width, 9 if dual else 6)
        self.norm1_context = Modulation(width, 2 if last else 6)
        self.attn = JointAttention(config, last=last)
        self.attn2 = PictureAttention(config) if dual else None
        self.ff = FeedForward(width)
        self.ff_context = None if last else FeedForward(width)

    def forward(self, x: Tensor, text: Tensor, conditioning: Tensor, taps: Taps | None = None) -> tuple[Tensor, Tensor]:
        """`x (B, N, width)`, `text (B, L, width)`, `conditioning (B, width)` -> the next `x` and `text`."""
        if taps and self.path in taps.bypass:
            return x, text
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1(conditioning)
        text_shift, text_scale, *rest = self._text_modulation(conditioning)
        y = normalised(x)
        heard = modulated(normalised(text), text_shift, text_scale)
        seen, read = self.attn(modulated(y, shift, scale), heard, taps)
        x = x + gate * seen
        if self.attn2 is not None:
            shift2, scale2, gate2 = second
            x = x + gate2 * self.attn2(modulated(y, shift2, scale2), taps)
        x = x + gate_ff * self.ff(modulated(normalised(x), shift_ff, scale_ff))
        if self.ff_context is not None:
            text_gate, shift_ff, scale_ff, gate_ff = rest
            text = text + text_gate * read
            text = text + gate_ff * self.ff_context(modulated(normalised(text), shift_ff, scale_ff))
        return x, text

    def _text_modulation(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = self.norm1_context(conditioning)
        # The last block has but two, the scale first: diffusers' AdaLayerNormContinuous.
        return parts if self.ff_context is not None else parts[::-1]


class MMDiT(nn.Module):
    """`F(x, t, context, vector)`: the velocity, for the published models (`parameterisation` says what it is)."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.pos_embed = PatchEmbedding(config)
        self.time_text_embed = Conditioning(config)
        self.context_embedder = nn.Linear(config.context_width, width)
        self.transformer_blocks = nn.ModuleList(JointBlock(config, i) for i in range(config.layers))
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, config.patch_size**2 * config.out_channels)
        for path, module in self.named_modules():
            if isinstance(module, PictureProjections | JointBlock):
                module.path = path

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        vector: Tensor,
        skip: frozenset[int] = frozenset(),
        *,
        taps: Taps | None = None,
    ) -> Tensor:
        """One evaluation.

        Args:
            x: `(B, in_channels, h, w)`, the noisy latents; `h` and `w` multiples of the patch size.
            timesteps: `(B,)`, 1000 times sigma for the published models; may be fractional.
            context: `(B, L, context_width)`, the encoded prompt.
            vector: `(B, vector_width)`, the pooled prompt.
            skip: indices of blocks to leave out, for skip-layer guidance (Stability's for 3.5 medium: 7, 8, 9).
            taps: where this evaluation differs; blocks are left out by their paths, too (`transformer_blocks.7`).

        Returns:
            `(B, out_channels, h, w)`.

        Raises:
            RequestError: a size that the model cannot draw, or a block to skip that it does not have.
        """
        if unknown := sorted(skip - set(range(self.config.layers))):
            raise RequestError(f"no block {unknown[0]} to skip: the model has blocks 0 to {self.config.layers - 1}")
        if skip:
            paths = frozenset(f"transformer_blocks.{index}" for index in skip)
            taps = (taps or Taps()).with_(Taps(bypass=paths))
        before = self.pos_embed(x)
        conditioning = self.time_text_embed(timesteps, vector)
        near, tap = self._tapped(taps)
        seen, text = self._through(range(near), before, self.context_embedder(context), conditioning, taps)

        def beyond() -> Tensor:
            return self._through(range(near, self.config.layers), seen, text, conditioning, taps)[0]

        tokens = tap(before, seen, beyond) if tap else beyond()
        scale, shift = self.norm_out(conditioning)
        return self._unpatched(self.proj_out(modulated(normalised(tokens), shift, scale)), *x.shape[-2:])

    def _through(
        self, indices: range, tokens: Tensor, text: Tensor, conditioning: Tensor, taps: Taps | None
    ) -> tuple[Tensor, Tensor]:
        """What some blocks, one after the other, make of both rows of tokens."""
        for index in indices:
            tokens, text = self.transformer_blocks[index](tokens, text, conditioning, taps)
            if taps:
                tokens = taps.plus(f"transformer_blocks.{index}", tokens)
        return tokens, text

    def _tapped(self, taps: Taps | None) -> "tuple[int, BeyondTap | None]":
        """How many blocks are on this side of `Taps.beyond`, and what answers for the rest."""
        if not taps or not taps.beyond:
            return self.config.layers, None
        ((place, tap),) = taps.beyond.items()
        return int(place.removeprefix("transformer_blocks.")) + 1, tap

    def _unpatched(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """`(B, N, patch * patch * C)`, row by row -> `(B, C, height, width)`."""
        p = self.config.patch_size
        grid = tokens.view(len(tokens), height // p, width // p, p, p, -1)  # batch, row, column, row, column, channel
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, height, width)


def _head_norm(config: MMDiTConfig) -> nn.Module:
    """RMS norm of each head's queries or keys (section 5.3.2), where the model has it."""
    return nn.RMSNorm(config.head_width, eps=NORM_EPS) if config.qk_norm else nn.Identity()
