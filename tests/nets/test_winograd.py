"""Winograd's 3x3 convolutions are those of the definition, up to rounding."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.nets import winograd as winograd_module
from reverie.nets.winograd import TILES, Tiles, transforms, winograd, winograd_weight

EXACT = 1e-5  # of the largest number, as of the other ways to compute a layer
COARSE = 0.03  # in bfloat16: inputs, weights and products are rounded by up to 2**-9, and sums of them to outputs


def filled(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).abs().max() / true.abs().max())


@pytest.mark.parametrize("tiles", TILES.values(), ids=lambda tiles: f"F({tiles.size}, 3)")
def test_the_transforms_are_exact(tiles: Tiles) -> None:
    inputs, weights, back = transforms(tiles)
    tile, kernel = torch.randn(tiles.span**2, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    found = back @ ((weights @ kernel) * (inputs @ tile))
    true = F.conv2d(tile.view(1, 1, tiles.span, tiles.span), kernel.view(1, 1, 3, 3)).flatten()
    assert torch.allclose(found, true, rtol=0, atol=1e-12)


def test_sums_of_two_are_the_smaller_tiles_values() -> None:
    padded, made = filled(2, 8, 10, 3).double(), torch.empty(4, 4, 2, 3, 4, 3, dtype=torch.float64)
    winograd_module._summed(padded, made, torch.empty(made.numel(), dtype=torch.float64))
    inputs, _, _ = transforms(TILES[torch.bfloat16])
    tiles = padded.unfold(1, 4, 2).unfold(2, 4, 2)  # (b, r, c, C, 4, 4)
    assert torch.allclose(made, torch.einsum("pq,brcdq->pbrcd", inputs, tiles.flatten(4)).view_as(made), atol=1e-12)


@pytest.mark.parametrize("worked", [1, 60_000, 8 << 20])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (3, 4), (8, 8), (9, 14), (17, 5)])
@pytest.mark.parametrize("padding", [(1, 1), (2, 1), (1, 3)])
def test_any_size_in_any_parts(
    size: tuple[int, int],
    padding: tuple[int, int],
    layout: torch.memory_format,
    worked: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TILES, torch.float32, replace(TILES[torch.float32], worked=worked))
    x, weight, bias = filled(3, 5, *size).contiguous(memory_format=layout), filled(7, 5, 3, 3), filled(7)
    true = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    found = winograd(x, winograd_weight(weight), bias, padding)
    assert found.shape == true.shape and error(found, true) < EXACT
    assert torch.equal(winograd(x, winograd_weight(weight), None, padding) + bias[:, None, None], found)


# Channels in and out and side of the map, as in SD 1.5: the deepest sums, and the widest map.
@pytest.mark.parametrize("shape", [(2560, 1280, 8), (1280, 640, 16), (320, 320, 64)])
def test_the_error_at_true_size(shape: tuple[int, int, int]) -> None:
    source, width, side = shape
    x, weight = F.silu(filled(1, source, side, side) * 3), filled(width, source, 3, 3) / (9 * source) ** 0.5
    true = F.conv2d(x.double(), weight.double(), padding=1)
    assert error(winograd(x, winograd_weight(weight), None, (1, 1)), true) < EXACT


@pytest.mark.parametrize("dtype", TILES)
def test_weights_grow_as_said(dtype: torch.dtype) -> None:
    found = winograd_weight(filled(8, 4, 3, 3).to(dtype))
    assert found.dtype == dtype and found.numel() == TILES[dtype].growth * 8 * 4 * 9


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (9, 14)])
@pytest.mark.parametrize("padding", [(1, 1), (2, 1)])
def test_any_size_in_bfloat16(size: tuple[int, int], padding: tuple[int, int]) -> None:
    x, weight, bias = (filled(*shape).bfloat16() for shape in ((3, 5, *size), (7, 5, 3, 3), (7,)))
    true = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    found = winograd(x, winograd_weight(weight), bias, padding)
    assert found.shape == true.shape and error(found, true) < COARSE


def test_the_error_in_bfloat16_is_a_few_times_that_of_rounding_weights() -> None:
    """As a root mean square: four roundings of sums of two and nine, against one of weights and one of outputs."""
    x, weight = filled(2, 640, 16, 16).bfloat16(), filled(640, 640, 3, 3) / 76
    true = F.conv2d(x.double(), weight.double(), padding=1)
    found, usual = (
        winograd(x, winograd_weight(weight.bfloat16()), None, (1, 1)),
        F.conv2d(x, weight.bfloat16(), padding=1),
    )
    own, plain = (float((y.double() - true).square().mean().sqrt()) for y in (found, usual))
    assert own < 3 * plain


def test_without_padding_and_from_a_view() -> None:
    x, weight = filled(2, 6, 12, 12)[:, ::2, 1:], filled(4, 3, 3, 3)
    true = F.conv2d(x.double(), weight.double())
    assert error(winograd(x, winograd_weight(weight), None, (0, 0)), true) < EXACT
