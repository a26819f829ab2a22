"""Reference-only control: a drawing that looks like a reference picture (lllyasviel, ControlNet discussion 1236).

At every step the reference, with as much noise as the drawing has, goes through the network once; what it says and is
shown there is kept. Then the drawing goes through:

    attention    its self-attention also looks at the tokens of the reference
    adain        its features get mean and deviation of the reference's (Huang & Belongie 2017, equation 8)

No weights are added, and nothing is trained.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from reverie.adapters.taps import beneath
from reverie.diffusion.process import AnyProcess
from reverie.errors import RequestError
from reverie.nets.attention import attention
from reverie.nets.unet import UNet
from reverie.sampling.guidance import Clock
from reverie.sampling.tapping import AttentionLayer
from reverie.types import AttentionTap, Cond, FeatureTap, Predict, Taps

EPSILON = 1e-6  # the least variance that is divided by; sd-webui-controlnet and diffusers have the same


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture that the drawing looks at.

    Attributes:
        latents: `(1, C, h, w)`, scaled latents of the picture; of any size, unless the network sees channels beside.
        noise: like it, standard normal: the same at every step, so that a picture can be drawn again.
        weight: share of the layers that look at it: of self-attention the widest first, of features those near the
            middle first; 1 is every self-attention, and features in half of the levels.
        start, end: fractions of the steps between which they do.
        attention, adain: which of the two ways.
    """

    latents: Tensor
    noise: Tensor
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    attention: bool = True
    adain: bool = False


@dataclass(eq=False)
class _Seen:
    """What was kept of the references at one step.

    Attributes:
        tokens: what self-attention layers were shown, `(B, N, width)` for each reference, by their paths.
        statistics: mean and variance of features over the picture, `(2, B, C, 1, 1)`, by the paths of steps.
    """

    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    statistics: dict[str, list[Tensor]] = field(default_factory=dict)


def self_attention(unet: UNet) -> list[str]:
    """The paths of a U-Net's self-attention layers, the widest first, else as they run."""
    paths = [path for path, _ in unet.named_modules() if path.endswith(".attn1")]
    width = {path: unet.get_submodule(f"{path}.to_out.0").out_features for path in paths}
    return sorted(paths, key=lambda path: -cast(int, width[path]))


def feature_steps(unet: UNet) -> dict[str, float]:
    """The paths of a U-Net's steps and how far they are from the middle: the weight from which they take part.

    It is 0 in the middle, `2 - 2 n / levels` on the n-th level down and `2 n / levels` on the n-th up, as diffusers'
    community pipeline for references has it.
    """
    levels, layers = len(unet.config.block_out_channels), unet.config.layers_per_block
    found = {} if unet.config.mid_attention is None else {"mid_block": 0.0}
    for n in range(levels):
        found |= {f"down_blocks.{n}.{j}": 2 - 2 * n / levels for j in range(layers)}
        found |= {f"up_blocks.{n}.{j}": 2 * n / levels for j in range(layers + 1)}
    return found


def referenced(
    predict: Predict, references: Sequence[Reference], network: nn.Module, process: AnyProcess, clock: Clock
) -> Predict:
    """`predict` with a network that also looks at references.

    Rows that are controlled less (`Cond.control`) see as much less of them: with 1 for the prompt and `1 - fidelity`
    for the negative prompt, `fidelity` is what A1111 calls style fidelity.

    Args:
        network: what `predict` runs, or the one that it is a form of: it is looked at for its names alone.
        clock: of the run.

    Raises:
        RequestError: a diffusion transformer; when it is asked, a reference that is not as large as what the network
            sees beside `x`.
    """
    if not isinstance(network, UNet):
        raise RequestError("reference-only looks through the self-attention of a U-Net, which this model has not")
    layers, steps = self_attention(network), feature_steps(network)

    def looking(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        seen = _Seen()
        for reference in references:
            if clock.within(sigma, reference.start, reference.end) and reference.weight > 0:
                taps = _writing(reference, seen, layers, steps)
                # the network as it is, without what else taps it
                predict(_noised(reference, x, sigma, cond, process), sigma, replace(cond, taps=taps))
        return predict(x, sigma, _reading(seen, cond))

    return looking


def _noised(reference: Reference, x: Tensor, sigma: float, cond: Cond, process: AnyProcess) -> Tensor:
    """The reference as noisy as `x`, once for every row."""
    if cond.channels is not None and cond.channels.shape[-2:] != reference.latents.shape[-2:]:
        raise RequestError("a reference for this model must be as large as the picture that is drawn")
    latents, noise = reference.latents.to(x), reference.noise.to(x)
    return process.noised(latents, noise, x.new_tensor(sigma)).expand(len(x), -1, -1, -1)


def _writing(reference: Reference, seen: _Seen, layers: Sequence[str], steps: dict[str, float]) -> Taps:
    """Taps that keep what the network says and is shown of a reference, and change nothing."""

    def tokens(path: str) -> AttentionTap:
        def tap(module: nn.Module, x: Tensor, context: Tensor | None, usual: Callable[[], Tensor]) -> Tensor:
            if context is None:
                seen.tokens.setdefault(path, []).append(x)
            return usual()

        return tap

    def statistics(path: str) -> FeatureTap:
        def tap(features: Tensor) -> Tensor:
            seen.statistics.setdefault(path, []).append(_statistics(features))
            return features

        return tap

    looking = [path for rank, path in enumerate(layers) if rank < reference.weight * len(layers)]
    taking = [path for path, least in steps.items() if reference.weight >= least]
    return Taps(
        attention={path: tokens(path) for path in looking} if reference.attention else {},
        features={path: statistics(path) for path in taking} if reference.adain else {},
    )


def _reading(seen: _Seen, cond: Cond) -> Cond:
    """The condition of a drawing that looks at what was kept."""
    if seen.tokens:
        cond = beneath(cond, {path: _attending(bank, cond.control) for path, bank in seen.tokens.items()})
    if seen.statistics:
        taps = Taps(features={path: _adapting(bank, cond.control) for path, bank in seen.statistics.items()})
        cond = replace(cond, taps=(cond.taps or Taps()).with_(taps))
    return cond


def _attending(bank: Sequence[Tensor], strengths: Tensor | None) -> AttentionTap:
    """Self-attention over a layer's own tokens and those of the references; by rows, in part or not at all."""

    def tap(module: nn.Module, x: Tensor, context: Tensor | None, usual: Callable[[], Tensor]) -> Tensor:
        layer = cast(AttentionLayer, module)
        seen = torch.cat([x, *bank], dim=1)
        q, k, v = (layer.split(t) for t in (layer.to_q(x), layer.to_k(seen), layer.to_v(seen)))
        both = layer.merged(attention(q, k, v))
        return both if strengths is None else torch.lerp(usual(), both, strengths.to(both)[:, None, None])

    return tap


def _adapting(bank: Sequence[Tensor], strengths: Tensor | None) -> FeatureTap:
    """Features with mean and deviation of the references'; by rows, in part or not at all."""

    def tap(features: Tensor) -> Tensor:
        mean, variance = _statistics(features)
        target, spread = torch.stack(list(bank)).mean(0)
        scale = (spread.clamp(min=EPSILON) / variance.clamp(min=EPSILON)).sqrt()
        adapted = (features - mean) * scale + target
        return (
            adapted if strengths is None else torch.lerp(features, adapted, strengths.to(features)[:, None, None, None])
        )

    return tap


def _statistics(features: Tensor) -> Tensor:
    """Mean and variance over the picture of `(B, C, h, w)`: `(2, B, C, 1, 1)`."""
    variance, mean = torch.var_mean(features, dim=(2, 3), keepdim=True, correction=0)
    return torch.stack([mean, variance])
