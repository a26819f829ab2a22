"""`Taps.beyond`: what lies beyond a place of a network, left to a tap."""

from collections.abc import Callable

import pytest
import torch
from tests.nets import test_mmdit
from tests.nets.test_unet import made
from torch import Tensor

from reverie.errors import RequestError
from reverie.nets.unet import UNet
from reverie.types import Taps

UNETS: dict[str, dict[str, object]] = {
    "two levels": {},
    "three levels": {"block_out_channels": (32, 64, 64), "attention": (1, 1, 0), "heads": (1, 1, 1)},
    "no middle": {"mid_attention": None, "layers_per_block": 1},
}


def inputs(seed: int = 0, height: int = 8, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, context = torch.randn(2, 4, height, width, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return x, torch.tensor([500.0, 500.0]), context


def usual(before: Tensor, seen: Tensor, rest: Callable[[], Tensor]) -> Tensor:
    return rest()


@pytest.mark.parametrize("kind", UNETS)
def test_what_is_usual_changes_nothing(kind: str) -> None:
    """In the same bits, wherever the way down is cut; odd sizes, too, which the way up must meet again."""
    network, given = made(**UNETS[kind]), inputs(height=7, width=5)
    whole = network(*given)
    for place in range(network.maps - 1):
        assert torch.equal(network(*given, Taps(beyond={f"skips.{place}": usual})), whole)


@pytest.mark.parametrize("kind", UNETS)
def test_features_that_are_kept_stand_for_what_lies_beyond(kind: str) -> None:
    """With those of the same input the answer is the same, and nothing beyond is run; with others it is another."""
    network, given = made(**UNETS[kind]), inputs()
    whole, other = network(*given), network(*inputs(1))
    for place in range(network.maps - 1):
        kept: list[Tensor] = []

        def keeping(before: Tensor, seen: Tensor, rest: Callable[[], Tensor], kept: list[Tensor] = kept) -> Tensor:
            kept.append(rest())
            return kept[-1]

        def giving(before: Tensor, seen: Tensor, rest: Callable[[], Tensor], kept: list[Tensor] = kept) -> Tensor:
            return kept[-1]

        network(*given, Taps(beyond={f"skips.{place}": keeping}))
        ran = run_with(network, Taps(beyond={f"skips.{place}": giving}), given)
        assert torch.equal(ran[0], whole)
        assert len(ran[1]) == 2 * place + 1  # residual blocks and downsamplers of both ways: one up for each map
        mixed = network(*inputs(1), Taps(beyond={f"skips.{place}": giving}))
        assert not torch.equal(mixed, other)
        assert not torch.equal(mixed, whole)


def run_with(network: UNet, taps: Taps, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, list[str]]:
    """The answer, and the paths of the steps that ran."""
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
        for path, module in network.named_modules()
        if path.split(".")[-2:-1] == ["resnets"] or path.endswith("downsamplers.0")
    ]
    try:
        return network(*given, taps), ran
    finally:
        for handle in handles:
            handle.remove()


def test_what_is_added_is_added_once_on_either_side() -> None:
    """Maps on this side and beyond get what a ControlNet adds, as without a tap."""
    network, given = made(), inputs()
    shapes: dict[str, Tensor] = {}
    for i, skip in enumerate(network.encoded(given[0], network.timed(*given[:2]), given[2])[1]):
        shapes[f"skips.{i}"] = torch.full_like(skip, 0.1 * (i + 1))
    shapes["mid_block"] = torch.ones(2, 64, 4, 3)
    whole = network(*given, Taps(added=shapes))
    assert not torch.equal(whole, network(*given))
    for place in range(network.maps - 1):
        assert torch.equal(network(*given, Taps(added=shapes, beyond={f"skips.{place}": usual})), whole)


def test_a_map_that_is_not_there_is_refused() -> None:
    network = made()
    with pytest.raises(RequestError, match=r"nothing lies beyond map 5 of this U-Net: the last one before is 4"):
        network(*inputs(), Taps(beyond={"skips.5": usual}))


@pytest.mark.parametrize("kind", list(test_mmdit.CONFIGS))
def test_a_transformer_without_its_other_blocks(kind: str) -> None:
    network, given = test_mmdit.made(test_mmdit.CONFIGS[kind]), test_mmdit.inputs(test_mmdit.CONFIGS[kind])
    whole = network(*given)
    assert torch.equal(network(*given, taps=Taps(beyond={"transformer_blocks.0": usual})), whole)
    seen: list[Tensor] = []

    def noting(before: Tensor, after: Tensor, rest: Callable[[], Tensor]) -> Tensor:
        seen.extend((before, after))
        return after

    alone = network(*given, taps=Taps(beyond={"transformer_blocks.0": noting}))
    others = frozenset(range(1, network.config.layers))
    assert torch.equal(alone, network(*given, others))
    assert not torch.equal(seen[0], seen[1])
