"""Reaching into the transformer of Stable Diffusion 3: blocks left out and attention answered by path."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.nets.test_mmdit import CONFIGS, inputs, made
from torch import Tensor, nn

from reverie.nets.mmdit import PictureProjections
from reverie.sampling.tapping import Layout, identity
from reverie.types import Taps

MEDIUM = "SD3.5 medium"


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("left_out", [{0}, {2}, {0, 1}])
def test_blocks_left_out_by_path(kind: str, left_out: set[int]) -> None:
    network, given = made(CONFIGS[kind]), inputs(CONFIGS[kind])
    taps = Taps(bypass=frozenset(f"transformer_blocks.{i}" for i in left_out))
    assert torch.equal(network(*given, taps=taps), network(*given, frozenset(left_out)))
    assert not torch.equal(network(*given, taps=taps), network(*given))


def test_taps_that_change_nothing() -> None:
    """And see what the layer sees: the picture's tokens, and the text's where it attends to them."""
    network, given = made(CONFIGS[MEDIUM]), inputs(CONFIGS[MEDIUM])
    seen: dict[str, tuple[torch.Size, torch.Size | None]] = {}

    def tap(module: nn.Module, x: Tensor, context: Tensor | None, usual: Callable[[], Tensor]) -> Tensor:
        assert isinstance(module, PictureProjections)
        seen[module.path] = x.shape, None if context is None else context.shape
        return usual()

    paths = [f"transformer_blocks.{i}.{name}" for i in range(3) for name in (("attn", "attn2") if i < 2 else ("attn",))]
    assert torch.equal(network(*given, taps=Taps(attention=dict.fromkeys(paths, tap))), network(*given))
    assert list(seen) == paths
    width = CONFIGS[MEDIUM].width
    assert seen["transformer_blocks.0.attn"] == ((2, 24, width), (2, 5, width))
    assert seen["transformer_blocks.0.attn2"] == ((2, 24, width), None)


def test_an_answer_instead_is_the_pictures_alone() -> None:
    """In the last block nobody reads the text any more: there a tap decides all that a block's attention says."""
    config = replace(CONFIGS["SD3"], layers=1)
    network, given = made(config), inputs(config)

    def nothing(module: nn.Module, x: Tensor, context: Tensor | None, usual: Callable[[], Tensor]) -> Tensor:
        return torch.zeros_like(usual())

    taps = Taps(attention={"transformer_blocks.0.attn": nothing})
    x, t, context, vector = given
    silent = network(*given, taps=taps)
    assert not torch.equal(silent, network(*given))
    # with its attention silent the picture hears no word
    assert torch.equal(silent, network(x, t, context + 1, vector, taps=taps))


def test_the_layout_names_its_places() -> None:
    layout = Layout.of(made(CONFIGS[MEDIUM]))
    assert layout.blocks == tuple(f"transformer_blocks.{i}" for i in range(3))
    assert layout.self_attention == tuple(f"transformer_blocks.{i}.attn" for i in range(3))
    network, given = made(CONFIGS[MEDIUM]), inputs(CONFIGS[MEDIUM])
    perturbed = network(*given, taps=Taps(attention=dict.fromkeys(layout.attention_at("1"), identity)))
    assert not torch.equal(perturbed, network(*given))
