"""The few types that every floor speaks of. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """

    attention: Mapping[str, AttentionTap] = field(default_factory=dict)
    bypass: frozenset[str] = frozenset()
    skips: Mapping[str, SkipTap] = field(default_factory=dict)
    added: Mapping[str, Tensor] = field(default_factory=dict)
    features: Mapping[str, FeatureTap] = field(default_factory=dict)

    def with_(self, other: Taps) -> Taps:
        """Both. What they add is added up; where both tap another place, `other` does."""
        sums = {path: t + other.added[path] if path in other.added else t for path, t in self.added.items()}
        return Taps(
            {**self.attention, **other.attention},
            self.bypass | other.bypass,
            {**self.skips, **other.skips},
            {**other.added, **sums},
            {**self.features, **other.features},
        )

    def plus(self, path: str, features: Tensor) -> Tensor:
        """Features of a place with what is added there."""
        return features + self.added[path].to(features) if path in self.added else features

    def changed(self, path: str, features: Tensor) -> Tensor:
        """Features of a step as they go on."""
        return self.features[path](features) if path in self.features else features


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
    """

    context: Tensor
    vector: Tensor | None = None
    channels: Tensor | None = None
    taps: Taps | None = None
    images: tuple[Tensor, ...] = ()
    control: Tensor | None = None


Denoise: TypeAlias = Callable[["Tensor", float], "Tensor"]
"""`(x, sigma) -> x0`: the waist of the design. `x (B, C, h, w)` in units of sigma, `sigma` one number."""

Predict: TypeAlias = Callable[["Tensor", float, Cond], "Tensor"]
"""`(x, sigma, condition) -> x0`: one condition, before guidance."""

Noise: TypeAlias = Callable[..., "Tensor"]
"""Standard normal noise shaped like `x`: `noise()` the next sample; for samplers registered as `brownian`,
`noise(sigma, sigma_next)`, the normalised increment of one Brownian path between two noise levels."""
