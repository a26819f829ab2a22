"""The preprocessors' networks against transformers, and against the papers' layers written out again."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from reverie.control.weights import folded
from reverie.nets import depth_anything, upernet
from reverie.nets.deeplab import STAGES as DEEPLAB_STAGES
from reverie.nets.deeplab import DeepLab, classes_at
from reverie.nets.depth_anything import DepthAnything
from reverie.nets.hed import Hed
from reverie.nets.line_drawing import LineDrawing
from reverie.nets.mlsd import Mlsd
from reverie.nets.mobilenet import SameConv2d
from reverie.nets.openpose_light import OpenPoseLight
from reverie.nets.upernet import UperNet


def assert_near(ours: Tensor, expected: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Float32, tens of layers in another order of operations; of an answer that says something."""
    assert expected.std() > 0.01
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that keep numbers near one, and statistics of norms that are not the neutral ones."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=random)
            if name.endswith("running_var"):
                value.copy_(0.5 + noise.square())
            elif value.ndim > 1:
                value.copy_(noise * math.sqrt(2 / value[0].numel()))
            else:
                value.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
    return module.eval().requires_grad_(False)


# transformers


def renamed_dino(names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of transformers' classes as the published files name them, whichever of both this version uses."""
    table = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
             "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense"}  # fmt: skip
    result: dict[str, Tensor] = {}
    for name, value in names.items():
        ours = name
        for theirs, published in table.items():
            ours = ours.replace(theirs, published)
        if not ours.endswith("mask_token"):
            result[ours] = value
    return result


def make(config: Any, **fields: Any) -> Any:
    return config(**fields)


def depth_oracle() -> nn.Module:
    # Keywords that transformers' configs take by inheritance, which their types do not say.
    backbone = make(Dinov2Config,
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=4, image_size=28, patch_size=7,
        out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = make(DepthAnythingConfig,
        backbone_config=backbone, patch_size=7, reassemble_hidden_size=24, neck_hidden_sizes=[4, 6, 8, 10],
        fusion_hidden_size=6, head_hidden_size=5,
    )  # fmt: skip
    return randomised(DepthAnythingForDepthEstimation(config))


TINY_DEPTH = depth_anything.DepthAnythingConfig(
    hidden=24, heads=2, layers=4, taps=(1, 2, 3, 4), positions=4, patch=7, neck=(4, 6, 8, 10), fusion=6, head=5
)


@pytest.mark.parametrize("size", [(28, 28), (42, 21)], ids=["positions-as-learned", "positions-resized"])
def test_depth_anything_is_transformers(size: tuple[int, int]) -> None:
    oracle, net = depth_oracle(), DepthAnything(TINY_DEPTH).eval()
    net.load_state_dict(renamed_dino(oracle.state_dict()))
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = oracle(x).predicted_depth
        assert_near(net(x), expected)


def test_depth_anything_refuses_a_size_it_cannot_cut() -> None:
    with pytest.raises(ValueError, match="multiples of 7"):
        DepthAnything(TINY_DEPTH)(torch.zeros(1, 3, 28, 30))


def test_the_config_of_depth_anything_is_in_its_shapes() -> None:
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in DepthAnything().state_dict().items()}
    assert depth_anything.config_of(shapes) == depth_anything.DepthAnythingConfig()
    with pytest.raises(ValueError, match="0 blocks"):
        depth_anything.config_of({})


def upernet_oracle() -> nn.Module:
    backbone = make(
        ConvNextConfig,
        hidden_sizes=[6, 8, 10, 12],
        depths=[1, 1, 2, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = make(UperNetConfig, backbone_config=backbone, hidden_size=7, num_labels=5, use_auxiliary_head=False)
    return randomised(UperNetForSemanticSegmentation(config))


def test_upernet_is_transformers() -> None:
    oracle = upernet_oracle()
    tensors = folded({k: v for k, v in oracle.state_dict().items() if v.is_floating_point()})
    config = upernet.config_of({name: value.shape for name, value in tensors.items()})
    assert config == upernet.UperNetConfig((6, 8, 10, 12), (1, 1, 2, 1), 7, 5)
    net = UperNet(config).eval()
    net.load_state_dict(tensors)
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = F.interpolate(net(x), size=(64, 96), mode="bilinear")
        expected = oracle(x).logits
    assert_near(ours, expected)


# The papers' layers, written out


def test_hed_is_vgg_with_side_outputs() -> None:
    stages = ((4, 2), (6, 2), (8, 3))
    net = randomised(Hed(stages))
    w = net.state_dict()
    x = torch.rand(1, 3, 21, 18) * 255
    y, sides = x - w["norm"], []
    for stage, (_, convolutions) in enumerate(stages, 1):
        if stage > 1:
            y = F.pad(y, (0, -y.shape[3] % 2, 0, -y.shape[2] % 2), value=-math.inf)
            y = y.unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(-2, -1))
        for i in range(convolutions):
            y = F.conv2d(y, w[f"block{stage}.convs.{i}.weight"], w[f"block{stage}.convs.{i}.bias"], padding=1).clamp(0)
        side = F.conv2d(y, w[f"block{stage}.projection.weight"], w[f"block{stage}.projection.bias"])
        sides.append(F.interpolate(side, size=(21, 18), mode="bilinear"))
    mixed = sum(side * gain for side, gain in zip(sides, w["fuse.weight"].flatten(), strict=True))
    assert_near(net(x), mixed + w["fuse.bias"], 1e-4, 1e-3)  # logits in the hundreds


def test_a_line_drawing_is_johnsons_generator() -> None:
    """Its convolutions by the names of the published file, norms and padding by their definitions."""
    net = randomised(LineDrawing(width=4, blocks=2))
    w = net.state_dict()

    def normed(y: Tensor) -> Tensor:
        centred = y - y.mean(dim=(2, 3), keepdim=True)
        return centred / (centred.square().mean(dim=(2, 3), keepdim=True) + 1e-5).sqrt()

    def conv(y: Tensor, name: str, pad: int, **how: Any) -> Tensor:
        return F.conv2d(
            F.pad(y, (pad,) * 4, mode="reflect") if pad else y, w[f"{name}.weight"], w[f"{name}.bias"], **how
        )

    x = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    y = normed(conv(x, "model0.1", 3)).relu()
    for place in (0, 3):
        y = normed(conv(y, f"model1.{place}", 0, stride=2, padding=1)).relu()
    for block in range(2):
        inner = normed(conv(y, f"model2.{block}.conv_block.1", 1)).relu()
        y = y + normed(conv(inner, f"model2.{block}.conv_block.5", 1))
    for place in (0, 3):
        weight, bias = w[f"model3.{place}.weight"], w[f"model3.{place}.bias"]
        y = F.conv_transpose2d(y, weight, bias, stride=2)[:, :, 1:, 1:][:, :, : 2 * y.shape[2], : 2 * y.shape[3]]
        y = normed(y).relu()
    assert_near(net(x), conv(y, "model4.1", 3).sigmoid())


@pytest.mark.parametrize("size", [4, 5, 8])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (3, 1, 2), (1, 1, 1)])
def test_same_padding_is_tensorflows(size: int, kernel: int, stride: int, dilation: int) -> None:
    """By its definition: output i reads input `i * stride - before + j * dilation`, nothing outside."""
    conv = randomised(SameConv2d(1, 1, kernel, stride, dilation=dilation))
    x = torch.randn(1, 1, size, size)
    outputs = -(-size // stride)
    before = max((outputs - 1) * stride + dilation * (kernel - 1) + 1 - size, 0) // 2
    weight = conv.state_dict()["weight"][0, 0]
    expected = conv.state_dict()["bias"].expand(outputs, outputs).clone()
    for row in range(outputs):
        for column in range(outputs):
            for i in range(kernel):
                for j in range(kernel):
                    y, z = row * stride - before + i * dilation, column * stride - before + j * dilation
                    if 0 <= y < size and 0 <= z < size:
                        expected[row, column] += weight[i, j] * x[0, 0, y, z]
    torch.testing.assert_close(conv(x)[0, 0], expected)


def inverted(x: Tensor, convs: Iterator[tuple[Tensor, Tensor]], stride: int, dilation: int, wide: bool) -> Tensor:
    """A block of MobileNetV2 on even sizes: TensorFlow pads strides at the right and bottom alone."""
    y = F.conv2d(x, *next(convs)).clamp(0, 6) if wide else x
    weight, bias = next(convs)
    pads = (0, 1, 0, 1) if stride == 2 else (dilation,) * 4
    y = F.conv2d(F.pad(y, pads), weight, bias, stride, dilation=dilation, groups=len(weight)).clamp(0, 6)
    y = F.conv2d(y, *next(convs))
    return x + y if x.shape == y.shape else y


def convolutions(module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            yield layer.weight, layer.bias


@pytest.mark.parametrize("anew", [False, True], ids=["tensorflow", "pytorch"])
def test_mlsd_is_a_mobilenet_and_a_pyramid(anew: bool) -> None:
    net = randomised(Mlsd(anew, width=8))
    x = torch.randn(1, 4, 32, 64, generator=torch.Generator().manual_seed(1))
    convs = convolutions(net.get_submodule("backbone"))
    y = F.conv2d(F.pad(x, (0, 1, 0, 1)), *next(convs), 2).clamp(0, 6)
    taps: list[Tensor] = []
    for blocks, stride in ((1, 1), (2, 2), (3, 2), (4, 2), (3, 1)):
        for i in range(blocks):
            y = inverted(y, convs, stride if i == 0 else 1, 1, wide=len(taps) > 0)
        taps.append(y)
    fine, y = taps[3], taps[4]
    for level, (merge, refine) in enumerate(((15, 16), (17, 18), (19, 20), (21, 22))):
        first, second = (net.get_submodule(f"block{merge}.conv{i}.0") for i in (1, 2))
        if level and not anew:
            y = F.interpolate(y, scale_factor=2, mode="bilinear")
        y = first(y).relu()
        if level and anew:
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
        y = torch.cat([second(fine).relu(), y], dim=1)
        first, second = (net.get_submodule(f"block{refine}.conv{i}.0") for i in (1, 2))
        y = second(first(y).relu() + y).relu()
        fine = taps[max(2 - level, 0)]
    for name in ("conv1.0", "conv2.0"):
        y = net.get_submodule(f"block23.{name}")(y).relu()
    y = net.get_submodule("block23.conv3")(y)
    middles, ends = net(x)
    assert middles.shape == (1, 1, 16, 32)
    assert_near(middles, y[:, 7:8])
    assert_near(ends, y[:, 8:12])


def test_deeplab_is_a_mobilenet_whose_later_strides_are_dilations() -> None:
    net = randomised(DeepLab(width=6, classes=4))
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    convs = convolutions(net.get_submodule("features"))
    y = F.conv2d(F.pad(x, (0, 1, 0, 1)), *next(convs), 2).clamp(0, 6)
    # One number a block: 17 blocks of section 6.3, output stride 8.
    strides = (1, 2, 1, 2, 1, 1, *[1] * 11)
    dilations = (*[1] * 7, *[2] * 7, *[4] * 3)
    for block, (stride, dilation) in enumerate(zip(strides, dilations, strict=True)):
        y = inverted(y, convs, stride, dilation, wide=block > 0)
    assert sum(blocks for _, _, blocks, _, _ in DEEPLAB_STAGES) == len(strides)
    w = net.state_dict()
    mean = F.conv2d(y.mean(dim=(2, 3), keepdim=True), w["image_pooling.weight"], w["image_pooling.bias"]).relu()
    here = F.conv2d(y, w["aspp0.weight"], w["aspp0.bias"]).relu()
    y = torch.cat([mean.expand_as(here), here], dim=1)
    y = F.conv2d(y, w["concat_projection.weight"], w["concat_projection.bias"]).relu()
    expected = F.conv2d(y, w["logits.weight"], w["logits.bias"])
    assert expected.shape == (1, 4, 8, 8)
    assert_near(net(x), expected, 1e-3, 1e-4)  # fifty layers, tens of thousands of terms
    assert classes_at(expected, (33, 65)).shape == (1, 33, 65)


def published_openpose(width: int, backbone: tuple[tuple[int, int, int], ...]) -> nn.Module:
    """The published network's layers, with its batch norms, of one refinement stage."""

    def conv(i: int, o: int, k: int = 3, s: int = 1, d: int = 1, bn: bool = False, relu: bool = True) -> nn.Sequential:
        layers: list[nn.Module] = [nn.Conv2d(i, o, k, s, d * (k // 2), d)]
        return nn.Sequential(*layers, *([nn.BatchNorm2d(o)] if bn else []), *([nn.ReLU()] if relu else []))

    def dw(i: int, o: int, s: int, d: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(i, i, 3, s, d, d, groups=i, bias=False), nn.BatchNorm2d(i), nn.ReLU(),
            nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(),
        )  # fmt: skip

    def dw_elu(c: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False), nn.ELU(), nn.Conv2d(c, c, 1, bias=False), nn.ELU()
        )

    def heads(i: int, hidden: int) -> dict[str, nn.Module]:
        return {name: nn.Sequential(conv(i, hidden, 1), conv(hidden, maps, 1, relu=False))
                for name, maps in (("heatmaps", 19), ("pafs", 38))}  # fmt: skip

    first = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    channels = [32, *(c for c, _, _ in backbone)]
    blocks = [dw(i, o, s, d) for i, (o, s, d) in zip(channels, backbone, strict=False)]
    refine = nn.Sequential(
        *(nn.ModuleDict({"initial": conv(i, width, 1), "trunk": nn.Sequential(
            conv(width, width, bn=True), conv(width, width, d=2, bn=True))})
          for i in (width + 57, *[width] * 4))
    )  # fmt: skip
    return nn.ModuleDict({
        "model": nn.Sequential(first, *blocks),
        "cpm": nn.ModuleDict({"align": conv(channels[-1], width, 1), "conv": conv(width, width),
                              "trunk": nn.Sequential(*(dw_elu(width) for _ in range(3)))}),
        "initial_stage": nn.ModuleDict({"trunk": nn.Sequential(*(conv(width, width) for _ in range(3))),
                                        **heads(width, 512)}),
        "refinement_stages": nn.ModuleList([nn.ModuleDict({"trunk": refine, **heads(width, width)})]),
    })  # fmt: skip


def run_published(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    at = net.get_submodule
    y = at("cpm.align")(at("model")(x))
    features = at("cpm.conv")(y + at("cpm.trunk")(y))
    y = at("initial_stage.trunk")(features)
    y = torch.cat([features, at("initial_stage.heatmaps")(y), at("initial_stage.pafs")(y)], dim=1)
    stage = "refinement_stages.0"
    for i in range(5):
        y = at(f"{stage}.trunk.{i}.initial")(y)
        y = y + at(f"{stage}.trunk.{i}.trunk")(y)
    return at(f"{stage}.heatmaps")(y), at(f"{stage}.pafs")(y)


def test_openpose_is_the_published_network_with_its_norms_folded() -> None:
    backbone = ((8, 1, 1), (12, 2, 1), (16, 2, 2), (16, 1, 1))
    published = randomised(published_openpose(8, backbone))
    net = OpenPoseLight(1, 8, backbone).eval()
    net.load_state_dict(folded({k: v for k, v in published.state_dict().items() if v.is_floating_point()}))
    x = torch.rand(1, 3, 32, 40) - 0.5
    with torch.no_grad():
        for ours, theirs in zip(net(x), run_published(published, x), strict=True):
            assert_near(ours, theirs, 1e-3, 1e-4)
