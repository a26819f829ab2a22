"""The few types that every floor speaks of. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor, nn

AttentionTap: TypeAlias = "Callable[[nn.Module, Tensor, Tensor | None, Callable[[], Tensor]], Tensor]"
"""`(module, x, context, usual) -> out`: answers instead of an attention layer; `usual()` is what it would have said."""

SkipTap: TypeAlias = "Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]"
"""`(features, skip) -> (features, skip)`, before a U-Net concatenates them on the way up."""

FeatureTap: TypeAlias = "Callable[[Tensor], Tensor]"
"""`features -> features (B, C, h, w)`, where a step of a U-Net has just said them."""

BeyondTap: TypeAlias = "Callable[[Tensor, Tensor, Callable[[], Tensor]], Tensor]"
"""`(before, seen, usual) -> found`: answers instead of all that lies beyond a place of a network.

`before` is what the part on this side began with, `seen` what it ended with; `usual()` is what lies beyond would find.
"""

MergeTap: TypeAlias = "Callable[[Tensor], tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]"
"""`tokens (B, N, C) -> (merge, unmerge)`: to fewer tokens `(B, M, C)` before self-attention, and back to all."""

PromptMemory: TypeAlias = "Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]"
"""`(module, context) -> (keys, values)`, each `(B, heads, M, d)`: what a cross-attention layer makes of the prompt."""


@dataclass(frozen=True, eq=False)
class Taps:
    """Where guidance and adapters reach into one evaluation of a network, by module path.

    An argument, not a hook: two evaluations at once never meet. Without taps a network runs as it is.

    Attributes:
        attention: by path of an attention layer, for example `mid_block.attentions.0.transformer_blocks.0.attn1`.
        bypass: paths of transformer blocks whose input passes through unchanged.
        skips: by path of an up block.
        added: what is added to features, by the path of a place: `down_blocks.1` (what the level says, before it is
            made smaller: T2I-Adapter) or `down_blocks.0.downsamplers` (after that: the same, of a level without
            attention), `skips.4` (the fifth map that the way up will want: ControlNet), `mid_block`, or
            `transformer_blocks.7` (what that block of a diffusion transformer says of the picture).
        features: by the path of a step of a U-Net: `down_blocks.1.0` and `up_blocks.2.1` (a residual block and the
            transformer behind it), or `mid_block`.
        beyond: at one place: `skips.2` of a U-Net, what comes back up to meet the third map of the way down; or
            `transformer_blocks.0` of a diffusion transformer, what its other blocks make of the picture's tokens.
        merging: by the path of a transformer block of a U-Net.
        prompt: what cross-attention layers of a U-Net made of the same context before; see `engine/once.py`.
        copies: the batch is so many copies of the same rows, one after the other, which nothing but `context` tells
            apart: what comes before the network looks at it need be computed for one of them alone.
    """

    attention: Mapping[str, AttentionTap] = field(default_factory=dict)
    bypass: frozenset[str] = frozenset()
    skips: Mapping[str, SkipTap] = field(default_factory=dict)
    added: Mapping[str, Tensor] = field(default_factory=dict)
    features: Mapping[str, FeatureTap] = field(default_factory=dict)
    beyond: Mapping[str, BeyondTap] = field(default_factory=dict)
    merging: Mapping[str, MergeTap] = field(default_factory=dict)
    prompt: PromptMemory | None = None
    copies: int = 1

    def with_(self, other: Taps) -> Taps:
        """Both. What they add is added up; where both tap another place, `other` does."""
        sums = {path: t + other.added[path] if path in other.added else t for path, t in self.added.items()}
        return Taps(
            {**self.attention, **other.attention},
            self.bypass | other.bypass,
            {**self.skips, **other.skips},
            {**other.added, **sums},
            {**self.features, **other.features},
            {**self.beyond, **other.beyond},
            {**self.merging, **other.merging},
            other.prompt or self.prompt,
            max(self.copies, other.copies),
        )

    def reach(self, path: str) -> bool:
        """Whether a transformer block of that path, or a layer inside it, is to say something else than usual."""
        inside = any(tapped.startswith(f"{path}.") for tapped in self.attention)
        return inside or path in self.bypass or path in self.merging

    def plus(self, path: str, features: Tensor) -> Tensor:
        """Features of a place with what is added there."""
        return features + self.added[path].to(features) if path in self.added else features

    def changed(self, path: str, features: Tensor) -> Tensor:
        """Features of a step as they go on."""
        return self.features[path](features) if path in self.features else features


@dataclass(frozen=True)
class Asked:
    """Which evaluation of a run this is: what is kept from one to the next is kept by it.

    Attributes:
        number: of the point that `denoise` was asked about, from 0; several evaluations may be at one point.
        names: of the conditions in the batch, in their order; at the next point each has the same name. None for one
            of which nothing is to be kept.
    """

    number: int
    names: tuple[Hashable, ...]


@dataclass(frozen=True, eq=False)
class Cond:
    """What a network is conditioned on.

    Attributes:
        context: `(B, L, D)`, the encoded prompt.
        vector: `(B, V)`, what is added to the time embedding (SDXL's pooled prompt and sizes, SD 3's pooled prompts).
        channels: `(B, C, h, w)`, what the network sees beside `x` (inpainting, instruct-pix2pix, depth).
        taps: how this evaluation differs inside the network.
        images: for each picture prompt (IP-Adapter) `(B, T, D)`, the tokens of its pictures.
        control: `(B,)`, 1 on rows that one-sided control nets act on, 0 on others; on all alike where it is None.
        asked: which evaluation this is; None where nobody counts.
    """

    context: Tensor
    vector: Tensor | None = None
    channels: Tensor | None = None
    taps: Taps | None = None
    images: tuple[Tensor, ...] = ()
    control: Tensor | None = None
    asked: Asked | None = None


Denoise: TypeAlias = Callable[["Tensor", float], "Tensor"]
"""`(x, sigma) -> x0`: the waist of the design. `x (B, C, h, w)` in units of sigma, `sigma` one number."""

Predict: TypeAlias = Callable[["Tensor", float, Cond], "Tensor"]
"""`(x, sigma, condition) -> x0`: one condition, before guidance."""

Noise: TypeAlias = Callable[..., "Tensor"]
"""Standard normal noise shaped like `x`: `noise()` the next sample; for samplers registered as `brownian`,
`noise(sigma, sigma_next)`, the normalised increment of one Brownian path between two noise levels."""
