"""The U-Net: what its config allows, and what it refuses. Numbers are compared in tests/parity."""

from dataclasses import replace

import pytest
import torch

from reverie.errors import RequestError
from reverie.nets.blocks import guidance_embedding
from reverie.nets.unet import Depths, UNet, UNetConfig

TINY = UNetConfig(
    block_out_channels=(32, 64), attention=(0, 1), heads=(1, 1), layers_per_block=2, context_width=16, groups=8
)


def made(**settings: object) -> UNet:
    torch.manual_seed(0)
    return UNet(replace(TINY, **settings)).eval().requires_grad_(False)  # type: ignore[arg-type]


def names(network: UNet) -> set[str]:
    return set(network.state_dict())


@pytest.mark.parametrize(
    ("attention", "up", "down_depths", "up_depths"),
    [
        ((0, 3), None, [(0, 0), (3, 3)], [(0, 0, 0), (3, 3, 3)]),
        ((False, True), None, [(0, 0), (1, 1)], [(0, 0, 0), (1, 1, 1)]),
        ((0, (1, 2)), ((3, 2, 1), 0), [(0, 0), (1, 2)], [(0, 0, 0), (3, 2, 1)]),
        ((0, 2), (0, 1), [(0, 0), (2, 2)], [(1, 1, 1), (0, 0, 0)]),
    ],
)
def test_depths(
    attention: Depths, up: Depths | None, down_depths: list[tuple[int, ...]], up_depths: list[tuple[int, ...]]
) -> None:
    config = replace(TINY, attention=attention, up_attention=up)
    assert [config.down_depths(i) for i in (0, 1)] == down_depths
    assert [config.up_depths(i) for i in (0, 1)] == up_depths
    network = UNet(config)
    for level in (0, 1):
        for way, depths in (("down", down_depths[level]), ("up", up_depths[level])):
            block = network.get_submodule(f"{way}_blocks.{level if way == 'down' else 1 - level}")
            found = [name for name, _ in block.named_modules() if name.endswith("attn1")]
            assert len(found) == sum(depths)


def test_the_middle() -> None:
    """Whole, one residual block alone, or none."""
    assert any("mid_block.attentions.0.transformer_blocks.2." in n for n in names(made(mid_attention=3)))
    alone = {n for n in names(made(mid_attention=0)) if n.startswith("mid_block.")}
    assert alone
    assert all(n.startswith("mid_block.resnets.0.") for n in alone)
    assert not any(n.startswith("mid_block.") for n in names(made(mid_attention=None)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attention": (0, (1, 2, 3))}, "3 depths of transformers for 2 residual blocks"),
        ({"attention": (0, (1, 0))}, "all or none of them must be there"),
        ({"heads": (1, 5)}, "5 heads do not divide 64 channels"),
    ],
)
def test_configs_that_cannot_be(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(**settings)


def test_the_wrong_number_of_channels() -> None:
    with pytest.raises(RequestError, match="takes 4 channels and was given 9"):
        made()(torch.zeros(1, 9, 8, 8), torch.zeros(1), torch.zeros(1, 7, 16))


def test_a_vector_is_added_for_each_picture() -> None:
    """Two pictures of a batch with different vectors are as each alone."""
    network = made(vector="add_embedding", vector_width=6)
    g = torch.Generator().manual_seed(0)
    x, context, vector = (torch.randn(shape, generator=g) for shape in ((2, 4, 8, 8), (2, 7, 16), (2, 6)))
    t = torch.tensor([3.0, 900.0])
    both = network(x, t, context, vector=vector)
    for i in (0, 1):
        alone = network(x[i : i + 1], t[i : i + 1], context[i : i + 1], vector=vector[i : i + 1])
        torch.testing.assert_close(alone, both[i : i + 1])
    assert (network(x, t, context, vector=vector.flip(0)) - both).abs().max() > 1e-4


def test_a_row_of_a_table() -> None:
    network = made(vector="class_table", vector_width=5)
    x, t, context = torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 7, 16)
    low, high = (network(x, t, context, vector=torch.tensor([[level]])) for level in (0.0, 4.0))
    assert (low - high).abs().max() > 1e-5


def test_guidance_embedding() -> None:
    """Without guidance all angles are 0."""
    found = guidance_embedding(torch.tensor([1.0, 8.5]), 8)
    assert found.shape == (2, 8)
    assert found[0].tolist() == [0.0] * 4 + [1.0] * 4
    assert found[1, 0] == pytest.approx(torch.tensor(7500.0).sin().item(), abs=1e-4)
