"""ControlNets of Stable Diffusion 3 and 3.5: a few blocks of a transformer that is shown a picture's latents.

Parameter names are those of diffusers' `SD3ControlNetModel`. There are two kinds: blocks like those of the transformer,
in which picture and text meet (InstantX, Alimama), and blocks for the picture alone (Stability's for 3.5 large), which
read no prompt and start from the tokens of the transformer they are made for.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from reverie.errors import RequestError
from reverie.nets.controlnet import zeroed
from reverie.nets.mmdit import (
    Conditioning,
    FeedForward,
    JointBlock,
    MMDiT,
    MMDiTConfig,
    Modulation,
    PatchEmbedding,
    PictureAttention,
    modulated,
    normalised,
)


@dataclass(frozen=True)
class SD3ControlNetConfig:
    """The shape of a ControlNet.

    Attributes:
        transformer: its blocks (`layers` is how many), widths and positions; the last block is one like the others.
        extra_channels: shown beside the picture's latents: 1, where the picture is to be kept (inpaint).
        joint: text and picture meet in every block; else the picture is alone and no prompt is read.
        own_positions: it makes tokens of the noisy latents itself; else as the transformer does, with its weights.
        zero_vector: the pooled prompt is zeros, and the picture's latents are not shifted (InstantX).
    """

    transformer: MMDiTConfig
    extra_channels: int = 0
    joint: bool = True
    own_positions: bool = True
    zero_vector: bool = True

    @property
    def channels(self) -> int:
        """What it is shown: latents, and whatever is beside them."""
        return self.transformer.in_channels + self.extra_channels


class Patches(nn.Module):
    """Latents to tokens, without positions."""

    def __init__(self, config: SD3ControlNetConfig) -> None:
        super().__init__()
        size = config.transformer.patch_size
        self.proj = zeroed(nn.Conv2d(config.channels, config.transformer.width, size, stride=size))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, N, width)`, row by row."""
        result: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return result


class PictureBlock(nn.Module):
    """Attention and feed-forward of the picture's tokens alone (DiT; diffusers' `SD3SingleTransformerBlock`)."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.norm1 = Modulation(config.width, 6)
        self.attn = PictureAttention(config)
        self.ff = FeedForward(config.width)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """`x (B, N, width)`, `conditioning (B, width)` -> the next `x`."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(conditioning)
        x = x + gate * self.attn(modulated(normalised(x), shift, scale))
        result: Tensor = x + gate_ff * self.ff(modulated(normalised(x), shift_ff, scale_ff))
        return result


class SD3ControlNet(nn.Module):
    """`F(x, t, context, hint, vector)`: what is added to the picture's tokens behind the transformer's blocks."""

    def __init__(self, config: SD3ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        shape, layers = config.transformer, range(config.transformer.layers)
        # With one block more none of these is the last, which would not go on with the text.
        among = replace(shape, layers=shape.layers + 1)
        self.pos_embed = PatchEmbedding(shape)
        self.time_text_embed = Conditioning(shape)
        self.context_embedder = nn.Linear(shape.context_width, shape.width) if config.joint else None
        self.transformer_blocks = nn.ModuleList(
            JointBlock(among, i) if config.joint else PictureBlock(shape) for i in layers
        )
        self.controlnet_blocks = nn.ModuleList(zeroed(nn.Linear(shape.width, shape.width)) for _ in layers)
        self.pos_embed_input = Patches(config)

    @classmethod
    def from_transformer(cls, transformer: MMDiT, layers: int, extra_channels: int = 0) -> "SD3ControlNet":
        """A ControlNet to be trained: the first blocks copied, all that is added to the transformer zero.

        Raises:
            ValueError: as many blocks as the transformer has, whose last is unlike the others, or none.
        """
        shape = transformer.config
        if not 0 < layers < shape.layers:
            raise ValueError(f"{layers} blocks of a transformer of {shape.layers}; expected 1 to {shape.layers - 1}")
        dual = tuple(i for i in shape.dual_attention if i < layers)
        own = replace(shape, layers=layers, dual_attention=dual)
        network = cls(SD3ControlNetConfig(own, extra_channels, zero_vector=False))
        theirs, ours = transformer.state_dict(), network.state_dict()
        network.load_state_dict(ours | {name: theirs[name] for name in ours if name in theirs})
        return network

    @property
    def maps(self) -> int:
        """How many answers it has: one for each of its blocks."""
        return len(self.controlnet_blocks)

    def hint(self, latents: Tensor) -> Tensor:
        """What is made of the control picture: `(1 or B, channels, h, w)`, scaled latents -> `(1 or B, N, width)`.

        Raises:
            RequestError: latents of other channels.
        """
        if latents.shape[1] != self.config.channels:
            raise RequestError(
                f"the ControlNet is shown {self.config.channels} channels and was given {latents.shape[1]}"
            )
        result: Tensor = self.pos_embed_input(latents)
        return result

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None, hint: Tensor, *, vector: Tensor
    ) -> tuple[Tensor, ...]:
        """One evaluation.

        Args:
            x, timesteps, context, vector: as for the transformer.
            hint: see `hint`; its batch is 1 or that of `x`.

        Returns:
            `(B, N, width)` of every block.

        Raises:
            RequestError: the picture is not of the size of what is drawn; see `MMDiT.forward`.
        """
        tokens = self.pos_embed(x)
        if tokens.shape[1] != hint.shape[1]:
            raise RequestError(f"a control picture of {hint.shape[1]} patches for a drawing of {tokens.shape[1]}")
        tokens = tokens + hint
        conditioning = self.time_text_embed(timesteps, torch.zeros_like(vector) if self.config.zero_vector else vector)
        text = None if self.context_embedder is None else self.context_embedder(context)
        found = []
        for block, last in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            if text is None:
                tokens = block(tokens, conditioning)
            else:
                tokens, text = block(tokens, text, conditioning)
            found.append(last(tokens))
        return tuple(found)
