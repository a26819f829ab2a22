"""ControlNets: what their configs allow, what they begin as, what they refuse. Numbers are compared in tests/parity."""

from dataclasses import replace

import pytest
import torch

from reverie.errors import RequestError
from reverie.nets.controlnet import ControlNet, ControlNetConfig, UnionConfig, widths_for
from reverie.nets.controlnet_sd3 import SD3ControlNet, SD3ControlNetConfig
from reverie.nets.mmdit import MMDiTConfig
from reverie.nets.unet import UNet, UNetConfig
from reverie.types import Taps

TINY = UNetConfig(
    block_out_channels=(32, 64), attention=(0, 1), heads=(1, 1), layers_per_block=2, context_width=16, groups=8
)
SHAPE = MMDiTConfig(layers=2, heads=2, head_width=8, context_width=12, vector_width=6, positions=8, base_positions=4)
X, TIMES, CONTEXT = torch.randn(2, 4, 5, 6), torch.tensor([3.0, 700.0]), torch.randn(2, 7, 16)


def unet(**settings: object) -> UNet:
    torch.manual_seed(0)
    return UNet(replace(TINY, **settings)).eval().requires_grad_(False)  # type: ignore[arg-type]


@pytest.mark.parametrize("middle", [1, 0, None])
@pytest.mark.parametrize("layers", [1, 2, 3])
@torch.no_grad()
def test_it_answers_for_every_map_and_begins_with_zeros(layers: int, middle: int | None) -> None:
    """A new one leaves what its U-Net says as it is, of every depth and without a middle, too."""
    base = unet(layers_per_block=layers, mid_attention=middle)
    network = ControlNet.from_unet(base, widths=widths_for(2)).eval()
    answers = network(X, TIMES, CONTEXT, network.hint([torch.rand(1, 3, 10, 12)]))
    assert len(answers) == network.maps == 2 * layers + 3
    assert not any(t.any() for t in answers)
    taps = Taps(added={f"skips.{i}": t for i, t in enumerate(answers[:-1])} | {"mid_block": answers[-1]})
    assert torch.equal(base(X, TIMES, CONTEXT, taps), base(X, TIMES, CONTEXT))
    ones = Taps(added={name: torch.ones_like(t) for name, t in taps.added.items()})
    assert not torch.equal(base(X, TIMES, CONTEXT, ones), base(X, TIMES, CONTEXT))


def test_from_an_inpainting_and_a_told_unet() -> None:
    """It sees the latents alone, and is not told the guidance scale."""
    base = unet(in_channels=9, guidance_width=8)
    network = ControlNet.from_unet(base, channels=5)
    assert torch.equal(network.conv_in.weight, base.conv_in.weight[:, :4])
    assert "time_embedding.cond_proj.weight" not in network.state_dict()
    assert network.controlnet_cond_embedding.conv_in.weight.shape[1] == 5
    name = "mid_block.resnets.0.conv1.weight"
    assert torch.equal(network.state_dict()[name], base.state_dict()[name])
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@torch.no_grad()
def test_the_picture_is_as_large_as_the_autoencoder_makes_it(factor: int) -> None:
    network = ControlNet(ControlNetConfig(TINY, widths=widths_for(factor))).eval()
    assert network.control.factor == factor
    assert network.hint([torch.rand(1, 3, 5 * factor, 6 * factor)]).features.shape == (1, 32, 5, 6)
    with pytest.raises(ValueError, match="expected 1, 2, 4 or 8"):
        widths_for(factor + 8)


def test_refusals() -> None:
    network = ControlNet(ControlNetConfig(TINY, widths=widths_for(2)))
    with pytest.raises(RequestError, match="shown 3 channels and was given 4"):
        network.hint([torch.rand(1, 4, 10, 12)])
    with pytest.raises(RequestError, match="a control picture of 8 x 12 pixels for a drawing of 12 x 10"):
        network(X, TIMES, CONTEXT, network.hint([torch.rand(1, 3, 12, 8)]))
    told = ControlNet(ControlNetConfig(replace(TINY, vector="add_embedding", vector_width=5), widths=(16,)))
    with pytest.raises(RequestError, match="wants a vector of 5 numbers"):
        told(X, TIMES, CONTEXT, told.hint([torch.rand(1, 3, 5, 6)]))
    other = SD3ControlNet(SD3ControlNetConfig(SHAPE))
    with pytest.raises(RequestError, match="shown 16 channels and was given 4"):
        other.hint(torch.rand(1, 4, 4, 4))
    with pytest.raises(RequestError, match="a control picture of 6 patches for a drawing of 4"):
        other(torch.rand(1, 16, 4, 4), torch.ones(1), torch.rand(1, 3, 12), other.hint(torch.rand(1, 16, 4, 6)),
              vector=torch.rand(1, 6))  # fmt: skip


def union() -> ControlNet:
    torch.manual_seed(0)
    network = ControlNet(ControlNetConfig(TINY, widths=(16,), union=UnionConfig(4, 32, heads=2))).eval()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return network.requires_grad_(False)


def test_a_union_tells_kinds_apart() -> None:
    network, picture = union(), torch.rand(1, 3, 5, 6)
    hints = [network.hint([picture], [kind]) for kind in range(4)]
    for one, other in ((0, 1), (1, 2), (2, 3)):
        assert not torch.allclose(hints[one].features, hints[other].features)
        assert hints[one].time is not None
        assert hints[other].time is not None
        assert not torch.allclose(hints[one].time, hints[other].time)  # type: ignore[arg-type]
    for kinds in ([], [4], [-1], [0, 1]):
        with pytest.raises(RequestError, match="a number from 0 to 3"):
            network.hint([picture], kinds)


def test_a_union_in_a_batch_is_each_of_its_pictures() -> None:
    """Tokens do not mix with those of other pictures."""
    network, pictures = union(), torch.rand(3, 3, 5, 6)
    together = network.hint([pictures], [2]).features
    for i in range(3):
        assert torch.allclose(together[i : i + 1], network.hint([pictures[i : i + 1]], [2]).features, atol=1e-4)


@torch.no_grad()
def test_blocks_without_text_read_no_prompt() -> None:
    torch.manual_seed(0)
    network = SD3ControlNet(SD3ControlNetConfig(SHAPE, joint=False, zero_vector=False)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, hint, vector = torch.randn(1, 16, 4, 4), network.hint(torch.randn(1, 16, 4, 4)), torch.randn(1, 6)
    plain = network(x, torch.ones(1), None, hint, vector=vector)
    assert all(torch.equal(a, b) for a, b in zip(
        plain, network(x, torch.ones(1), torch.randn(1, 3, 12), hint, vector=vector), strict=True))  # fmt: skip
    assert not torch.allclose(plain[1], network(x, torch.ones(1), None, hint, vector=2 * vector)[1])
    silent = SD3ControlNet(SD3ControlNetConfig(SHAPE, joint=False)).eval()
    silent.load_state_dict(network.state_dict())
    same = [silent(x, torch.ones(1), None, hint, vector=v)[1] for v in (vector, 2 * vector)]
    assert torch.equal(*same)
