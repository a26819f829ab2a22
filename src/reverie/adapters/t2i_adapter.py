"""T2I-Adapters (Mou et al. 2023): a picture of edges, depth, pose says what is added to a U-Net on the way down.

What they say does not depend on the noise, so that it is computed once a picture and added at every step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reverie.errors import RequestError
from reverie.nets.t2i_adapter import StyleAdapter, T2IAdapter
from reverie.nets.unet import UNetConfig
from reverie.sampling.guidance import Clock, tapped
from reverie.types import Cond, Predict, Taps

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey: ITU-R BT.601, Pillow's mode L


@dataclass(frozen=True)
class Place:
    """Where a U-Net takes a feature map.

    Attributes:
        path: in `Taps.added`.
        width: its channels.
        halvings: how often the latents were halved there.
    """

    path: str
    width: int
    halvings: int


@dataclass(frozen=True, eq=False)
class FeatureControl:
    """Features of a picture, added to the U-Net's.

    Attributes:
        features: by their places, `(1, C, h, w)`, or one row for each picture that is drawn.
        weight: how strongly they act.
        start, end: fractions of the steps between which they do.
    """

    features: Mapping[Place, Tensor]
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True, eq=False)
class StylePrompt:
    """A picture whose style the prompt is followed by.

    Attributes:
        tokens: `(1, T, D)`, of `style_tokens`.
        weight: what they are multiplied with.
        start, end: fractions of the steps between which they are there.
    """

    tokens: Tensor
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0


def places(config: UNetConfig) -> list[Place]:
    """Where a U-Net takes the feature maps of a T2I-Adapter, in their order.

    A level adds its map to what it says last, before it is made smaller; one without attention after that; what is
    left over goes to the middle (diffusers' `UNet2DConditionModel`; TencentARC's of SDXL agree).
    """
    found = []
    last = len(config.block_out_channels) - 1
    for level, width in enumerate(config.block_out_channels):
        before = any(config.down_depths(level)) or level == last
        path = f"down_blocks.{level}" if before else f"down_blocks.{level}.downsamplers"
        found.append(Place(path, width, level if before else level + 1))
    if config.mid_attention is not None:
        found.append(Place("mid_block", config.block_out_channels[-1], last))
    return found


def features(adapter: T2IAdapter, picture: Tensor, config: UNetConfig) -> dict[Place, Tensor]:
    """What a T2I-Adapter says of a picture, at the places of a U-Net.

    Args:
        picture: `(B, 3 or 1, H, W)` in [0, 1], of the size that is drawn; made grey where the adapter wants it.

    Raises:
        RequestError: a picture of another number of channels.
    """
    weight = next(adapter.parameters())
    if adapter.config.channels == 1 and picture.shape[1] == 3:
        picture = (picture * picture.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
    elif adapter.config.channels == 3 and picture.shape[1] == 1:
        picture = picture.expand(-1, 3, -1, -1)
    with torch.no_grad():
        return dict(zip(places(config), adapter(picture.to(weight)), strict=False))


def adapted(predict: Predict, controls: Sequence[FeatureControl], clock: Clock) -> Predict:
    """`predict` with a network to which the features of pictures are added.

    Rows that are controlled less (`Cond.control`) get as much less of them.

    Args:
        clock: of the run.

    Raises:
        RequestError: when it is asked about a part of the picture alone, or one of another size.
    """

    def controlled(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        added = Taps()
        for control in controls:
            if control.weight and clock.within(sigma, control.start, control.end):
                added = added.with_(Taps(added=_rows(control, x, cond.control)))
        return predict(x, sigma, tapped(cond, added) if added.added else cond)

    return controlled


def _rows(control: FeatureControl, x: Tensor, strengths: Tensor | None) -> dict[str, Tensor]:
    """What is added, by path, for every row of `x`."""
    found: dict[str, Tensor] = {}
    for place, feature in control.features.items():
        size = tuple(-(-side // 2**place.halvings) for side in x.shape[-2:])
        if size != tuple(feature.shape[-2:]):
            raise RequestError(
                f"the T2I-Adapter's picture makes a map of {feature.shape[-1]} x {feature.shape[-2]} where the drawing "
                f"has {size[1]} x {size[0]}; give it a picture of the drawing's size, and draw without tiles"
            )
        rows = control.weight * (feature if len(feature) == 1 else feature.repeat(len(x) // len(feature), 1, 1, 1))
        found[place.path] = rows if strengths is None else rows * strengths.to(rows)[:, None, None, None]
    return found


def style_tokens(adapter: StyleAdapter, states: Tensor) -> Tensor:
    """The tokens `(1, T, D)` of a picture's style.

    Args:
        states: `(1, N, source)`, what the image encoder says last: `ClipVision.states(clip_pixels(picture))`.

    Raises:
        RequestError: another image encoder than CLIP ViT-L/14.
    """
    if states.shape[-1] != adapter.config.source:
        raise RequestError(
            f"the style adapter was made for states of {adapter.config.source} channels (CLIP ViT-L/14), the image "
            f"encoder's have {states.shape[-1]}; give another with encoder=FILE"
        )
    with torch.no_grad():
        result: Tensor = adapter(states.to(adapter.style_embedding))
    return result


def styled(cond: Cond, style: StylePrompt, *, negative: bool = False) -> Cond:
    """A condition whose prompt is followed by the tokens of a style; a negative one by its own last tokens.

    So both stay of one length (TencentARC/T2I-Adapter's samplers). Which steps it holds for is up to the conditions
    of each step.
    """
    count, rows = style.tokens.shape[1], len(cond.context)
    more = cond.context[:, -count:] if negative else style.weight * style.tokens.to(cond.context).expand(rows, -1, -1)
    return replace(cond, context=torch.cat([cond.context, more], dim=1))
