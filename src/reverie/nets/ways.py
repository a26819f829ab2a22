"""Ways to compute the same layer: torch's usual call, another layout in memory, weights packed for oneDNN, Winograd's.

oneDNN computes with weights in an order that suits the processor and the shape of the input; torch brings them into it
at every call, or hands the product to another library. `packed` does it once. The operators for that are private to
torch (its own compiler uses them), so that one check says whether they are there and right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, Protocol, TypeAlias, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.nets.attention import GEGLU, Attention, Layer, gated
from reverie.nets.forms import shared, with_layers
from reverie.nets.mmdit import PictureProjections
from reverie.nets.winograd import TILES, winograd, winograd_weight

M = TypeVar("M", bound=nn.Module)
L = TypeVar("L", nn.Linear, nn.Conv2d)
Ready: TypeAlias = Tensor | tuple[Tensor, ...]
LEAST = 1 << 13  # numbers of a weight; smaller layers take no time
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Way(Generic[L]):
    """A way to compute a linear layer or a convolution.

    Attributes:
        run: `(layer, x, weight) -> y`.
        prepare: `(layer, weight, x)` -> the weight as this way wants it, for inputs like `x`; None: as it is.
        private: whether it needs operators that are private to torch.
        fits: which layers and inputs it can be used for; None for all.
        growth: how many times as large as the weight the prepared one is.
        anywhere: whether one prepared weight is good for inputs of every shape.
        summed: `(layer, x, weight, to) -> to + y` in one pass; None where it has none.
    """

    name: str
    run: Callable[[L, Tensor, Any], Tensor]
    prepare: Callable[[L, Tensor, Tensor], Ready] | None = None
    private: bool = False
    fits: Callable[[L, Tensor], bool] | None = None
    growth: float = 1.0
    anywhere: bool = False
    summed: Callable[[L, Tensor, Any, Tensor], Tensor] | None = None

    def plus(self, layer: L, x: Tensor, weight: Any, to: Tensor | None) -> Tensor:
        """What the layer says, added to `to` where that is given."""
        if to is None:
            return self.run(layer, x, weight)
        if self.summed is None or to.dtype != x.dtype:
            return to + self.run(layer, x, weight)
        return self.summed(layer, x, weight, to)

    def usable(self, layer: L, x: Tensor) -> bool:
        """Whether it can be used here."""
        return (not self.private or onednn_computes(x.dtype)) and (self.fits is None or self.fits(layer, x))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _plain_linear(layer: nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight, layer.bias)


def _onednn_linear(layer: nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")
    return result


def _onednn_linear_summed(layer: nn.Linear, x: Tensor, weight: Tensor, to: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, to, weight, layer.bias, "add")
    return result


def _packed_linear(layer: nn.Linear, weight: Tensor, x: Tensor) -> Tensor:
    rows = x.numel() // x.shape[-1]
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return result


def _gated(
    linear: Callable[[nn.Linear, Tensor, Tensor], Tensor], layer: nn.Linear, x: Tensor, weight: Tensor
) -> Tensor:
    return gated(lambda rows: linear(layer, rows, weight), x)


def _fused_gated(layer: nn.Linear, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """The gate first, whose GELU oneDNN computes before it writes; then the rest, times the gate."""
    biases = (None, None) if layer.bias is None else layer.bias.chunk(2)
    gate = torch.ops.mkldnn._linear_pointwise(x, weights[1], biases[1], "gelu", [], "none")
    result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, gate, weights[0], biases[0], "mul")
    return result


def _onednn_gated(layer: nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    return _fused_gated(layer, x, weight.chunk(2))


def _fused_weights(layer: nn.Linear, weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(_packed_linear(layer, part, x) for part in weight.chunk(2))


def _plain_conv(layer: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _channels_last_conv(layer: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    return _plain_conv(layer, _channels_last(x), weight)


def _onednn_conv(layer: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """The answer is in channels-last order."""
    result: Tensor = torch.ops.mkldnn._convolution_pointwise(
        _channels_last(x), weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups, "none", [], ""
    )
    return result


def _onednn_conv_summed(layer: nn.Conv2d, x: Tensor, weight: Tensor, to: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._convolution_pointwise.binary(
        _channels_last(x), _channels_last(to), weight, layer.bias, layer.padding, layer.stride, layer.dilation,
        layer.groups, "add", None, None, [], None,
    )  # fmt: skip
    return result


def _packed_conv(layer: nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight.detach(), layer.padding, layer.stride, layer.dilation, layer.groups, list(x.shape)
    )
    return result


def _winograd_conv(layer: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """The answer is in channels-last order."""
    return winograd(x, weight, layer.bias, _sides(layer))


def _winograd_weight(layer: nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    return winograd_weight(weight)


def _is_not_last(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether it is another way than the usual one."""
    return not x.is_contiguous(memory_format=torch.channels_last)


def _fits_winograd(dtype: torch.dtype, layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether Winograd's tiles of a type are for this kernel and input."""
    usual = layer.kernel_size == (3, 3) and layer.stride == layer.dilation == (1, 1) and layer.groups == 1
    return usual and x.dtype == dtype and all(s + 2 * p > 2 for s, p in zip(x.shape[2:], _sides(layer), strict=True))


def _sides(layer: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(layer.padding, str)
    above, left = layer.padding
    return above, left


LINEAR = (
    Way[nn.Linear]("plain", _plain_linear),
    Way[nn.Linear]("onednn", _onednn_linear, private=True, summed=_onednn_linear_summed),
    Way[nn.Linear]("packed", _onednn_linear, _packed_linear, private=True, summed=_onednn_linear_summed),
)
GATED = (
    Way[nn.Linear]("plain", partial(_gated, _plain_linear)),
    Way[nn.Linear]("onednn", _onednn_gated, private=True),
    Way[nn.Linear]("packed", partial(_gated, _onednn_linear), _packed_linear, private=True),
    Way[nn.Linear]("fused", _fused_gated, _fused_weights, private=True),
)
CONVOLUTION = (
    Way[nn.Conv2d]("plain", _plain_conv),
    Way[nn.Conv2d]("channels_last", _channels_last_conv, fits=_is_not_last),
    Way[nn.Conv2d]("packed", _onednn_conv, _packed_conv, private=True, summed=_onednn_conv_summed),
    *(
        Way[nn.Conv2d](
            "winograd",
            _winograd_conv,
            _winograd_weight,
            fits=partial(_fits_winograd, dtype),
            growth=tiles.growth,
            anywhere=True,
        )
        for dtype, tiles in TILES.items()
    ),
)


@cache
def onednn_computes(dtype: torch.dtype) -> bool:
    """Whether torch's private operators of oneDNN are here, compute in this type and are right."""
    try:
        with torch.no_grad():
            return _supported(dtype) and _agrees(dtype)
    except (AttributeError, RuntimeError, TypeError):  # not there, not for this processor, of another signature
        return False


def _supported(dtype: torch.dtype) -> bool:
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def _agrees(dtype: torch.dtype) -> bool:
    """Small layers by every private way against the usual one."""
    random = torch.Generator().manual_seed(0)
    linear, conv = nn.Linear(32, 16, dtype=dtype), nn.Conv2d(16, 32, 3, padding=1, dtype=dtype)
    tokens, picture = (torch.randn(shape, generator=random).to(dtype) for shape in ((2, 8, 32), (2, 16, 8, 8)))
    close, added = torch.finfo(dtype).eps * 16, tokens[..., :16].contiguous()
    packed, said = _packed_conv(conv, conv.weight, picture), conv(picture)
    pairs = (
        (_onednn_linear(linear, tokens, linear.weight), linear(tokens)),
        (_onednn_linear(linear, tokens, _packed_linear(linear, linear.weight, tokens)), linear(tokens)),
        (_fused_gated(linear, tokens, _fused_weights(linear, linear.weight, tokens)), gated(linear, tokens)),
        (_onednn_linear_summed(linear, tokens, linear.weight, added), added + linear(tokens)),
        (_onednn_conv(conv, picture, packed), said),
        (_onednn_conv_summed(conv, picture, packed, said), said + said),
    )
    return all(torch.allclose(own, usual, rtol=close, atol=close) for own, usual in pairs)


# Layers that are computed in a way that is chosen as they run


class Chooser(Protocol):
    """Computes layers in the way that it holds to be the fastest for their shapes."""

    def linear(self, layer: nn.Linear, x: Tensor, to: Tensor | None = None) -> Tensor:
        """What `nn.Linear` says, added to `to`."""

    def convolution(self, layer: nn.Conv2d, x: Tensor, to: Tensor | None = None) -> Tensor:
        """What `nn.Conv2d` says, added to `to`."""

    def gated(self, layer: Layer, x: Tensor) -> Tensor:
        """What `nets.attention.gated` says."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What `attention` says."""


class ChosenLinear(nn.Linear):
    """A linear layer that leaves to a chooser how it is computed."""

    chooser: Chooser

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """`(..., in)` -> `(..., out)`."""
        return self.chooser.linear(self, input)

    def summed(self, x: Tensor, to: Tensor) -> Tensor:
        """`to + forward(x)`."""
        return self.chooser.linear(self, x, to)


class ChosenConv2d(nn.Conv2d):
    """A convolution that leaves to a chooser how it is computed."""

    chooser: Chooser

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """`(B, in, h, w)` -> `(B, out, h', w')`."""
        return self.chooser.convolution(self, input)

    def summed(self, x: Tensor, to: Tensor) -> Tensor:
        """`to + forward(x)`."""
        return self.chooser.convolution(self, x, to)


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is one of torch's own, and not to be trained."""
    return type(weight) is nn.Parameter and not weight.requires_grad


def chosen(network: M, chooser: Chooser, ready: Callable[[Tensor], bool] = is_plain) -> M:
    """The form of a network whose linear layers, convolutions and attention are computed as `chooser` says.

    Layers of other classes (seamless convolutions), packed weights of files and small layers stay as they are.
    A form made of this one, with other weights or with branches, is computed in the same way.

    Args:
        ready: which weights the chooser can take.
    """
    layers: dict[str, nn.Module] = {}
    for path, module in network.named_modules():
        if isinstance(module, Attention | PictureProjections):
            attending = layers[path] = shared(module)
            attending.attend = chooser.attend
        elif isinstance(module, GEGLU):
            gating = layers[path] = shared(module)
            gating.gated = chooser.gated
        elif _is_choosable(module) and ready(module.weight):
            layers[path] = _chosen(module, chooser)
    return with_layers(network, layers)


def _is_choosable(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether a layer has other ways than the usual one, and is large enough for them to matter."""
    if type(module) is not nn.Linear and not (type(module) is nn.Conv2d and _is_usual(module)):
        return False
    return module.weight.dtype in TYPES and module.weight.numel() >= LEAST


def _is_usual(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _chosen(layer: nn.Module, chooser: Chooser) -> nn.Module:
    copy = shared(layer)
    copy.__class__ = ChosenLinear if isinstance(layer, nn.Linear) else ChosenConv2d
    copy.chooser = chooser  # type: ignore[assignment]
    return copy
