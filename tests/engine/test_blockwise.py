"""Blocks brought one after the other: the same numbers, little memory, the next one ahead, nothing left behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reverie.checkpoint.load import build
from reverie.checkpoint.save import write_weights
from reverie.checkpoint.source import open_weights
from reverie.engine.blockwise import BLOCKS, Conveyor, blocks_of, blockwise, slots_of
from reverie.engine.forecast import Tally
from reverie.engine.mapped import MappedFiles
from reverie.nets.blocks import ResnetBlock
from reverie.nets.unet import UNet, UNetConfig

CONFIG = UNetConfig(block_out_channels=(32, 64), attention=(1, 1), heads=(8, 8), layers_per_block=1, context_width=64)
CPU = torch.device("cpu")


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


ARGS = (_noise(2, 4, 8, 8), torch.full((2,), 3.0), _noise(2, 7, 64))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("blocks") / "unet.safetensors"
    write_weights(path, {name: t.half() for name, t in UNet(CONFIG).state_dict().items()})
    return path


@pytest.fixture
def network(path: Path) -> UNet:
    """Mapped, in float16."""
    file = open_weights(path)
    return build(lambda: UNet(CONFIG), {name: file.tensor(name) for name in file.tensors}, "the U-Net")


def _whole(path: Path, dtype: torch.dtype) -> Tensor:
    file = open_weights(path)
    tensors = {name: file.tensor(name) for name in file.tensors}
    with torch.no_grad():
        found: Tensor = build(lambda: UNet(CONFIG), tensors, "it").to(dtype)(*(t.to(dtype) for t in ARGS))
    return found


def _asked(network: nn.Module, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(*(t.to(dtype) for t in ARGS))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits(path: Path, network: UNet, dtype: torch.dtype) -> None:
    """Converted a block at a time, or left in the file where nothing is to be converted."""
    form, _ = blockwise(network, CPU, dtype)
    for _ in range(3):  # the order is learned in the first
        assert torch.equal(_asked(form, dtype), _whole(path, dtype))


def test_blocks_are_brought_ahead_in_the_order_they_are_used(network: UNet) -> None:
    form, conveyor = blockwise(network, CPU, torch.float32)
    log: list[tuple[str, int]] = []
    conveyor.log = lambda what, number: log.append((what, number))
    _asked(form, torch.float32)
    count = len(blocks_of(network))
    order = [number for what, number in log if what == "drop"]
    assert sorted(order) == list(range(count))  # each once
    log.clear()
    _asked(form, torch.float32)
    _asked(form, torch.float32)
    brought = [number for what, number in log if what == "bring"]
    assert brought[-count:] == order[1:] + order[:1]  # one ahead of the block that computes
    for number in order[1:]:
        before = order[order.index(number) - 1]
        last = len(log) - 1 - log[::-1].index(("drop", before))
        assert ("bring", number) in log[:last]  # while the block before it was there


def test_at_most_two_blocks_have_memory(network: UNet) -> None:
    form, conveyor = blockwise(network, CPU, torch.float32)
    there: set[int] = set()
    most: list[int] = []

    def tell(what: str, number: int) -> None:
        (there.add if what == "bring" else there.discard)(number)
        most.append(len(there))

    conveyor.log = tell
    for _ in range(3):
        _asked(form, torch.float32)
    assert max(most) == 2
    conveyor.clear()
    assert not there


def test_memory_is_that_of_two_blocks(network: UNet) -> None:
    sizes = sorted(4 * sum(slot.there.numel() for slot in slots_of(block)) for block in blocks_of(network))
    form, _ = blockwise(network, CPU, torch.float32)
    with Tally() as tally:
        for _ in range(3):
            _asked(form, torch.float32)
    activations = Tally()
    plain = network.float()
    with activations:
        _asked(plain, torch.float32)
    assert tally.peak <= activations.peak + sum(sizes[-2:])
    assert activations.peak < tally.peak


class _Failing(nn.Module):
    def forward(self, *args: Any) -> Tensor:
        raise ArithmeticError("in the middle")


def test_an_error_leaves_every_weight_where_it_was(path: Path, network: UNet) -> None:
    form, conveyor = blockwise(network, CPU, torch.float32)
    there = {name: p.data_ptr() for name, p in form.named_parameters()}
    _asked(form, torch.float32)
    block = next(module for module in form.up_blocks.modules() if isinstance(module, ResnetBlock))
    usual, block.conv2 = block.conv2, _Failing()  # type: ignore[assignment]
    with pytest.raises(ArithmeticError, match="in the middle"):
        _asked(form, torch.float32)
    block.conv2 = usual
    assert conveyor._coming is None
    assert {name: p.data_ptr() for name, p in form.named_parameters()} == there
    assert torch.equal(_asked(form, torch.float32), _whole(path, torch.float32))


def test_an_interrupt_leaves_it_usable(path: Path, network: UNet) -> None:
    """Ctrl-C is no `Exception`: torch tells no hook of it."""
    form, _ = blockwise(network, CPU, torch.float32)
    handle = form.conv_out.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(KeyboardInterrupt()))
    inner = blocks_of(form)[3].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    for hook in (inner, handle):
        with pytest.raises(KeyboardInterrupt):
            _asked(form, torch.float32)
        hook.remove()
    assert torch.equal(_asked(form, torch.float32), _whole(path, torch.float32))


def test_the_network_itself_is_untouched(network: UNet) -> None:
    before = {name: (p.data_ptr(), p.dtype) for name, p in network.named_parameters()}
    form, _ = blockwise(network, CPU, torch.float32)
    _asked(form, torch.float32)
    assert {name: (p.data_ptr(), p.dtype) for name, p in network.named_parameters()} == before


def test_blocks_do_not_lie_inside_each_other(network: UNet) -> None:
    for block in blocks_of(network):
        assert not any(isinstance(inner, BLOCKS) for inner in block.modules() if inner is not block)


def test_mapped_weights_are_known_and_stay_what_they_are(path: Path, network: UNet) -> None:
    files = MappedFiles()
    mapped, own = network.conv_in.weight, torch.ones(5000)
    assert files.holds(mapped)
    assert not files.holds(own)
    want = mapped.clone()
    files.unwanted([mapped, own])
    files.wanted([mapped, own])
    assert torch.equal(mapped, want)
    assert bool((own == 1).all())  # what is no file's is never let go: it would be zeros


def test_a_conveyor_of_no_blocks_does_nothing() -> None:
    layer = nn.Linear(3, 3)
    form, conveyor = blockwise(layer, CPU, torch.float32)
    assert isinstance(conveyor, Conveyor)
    x = torch.ones(1, 3)
    assert torch.equal(form(x), layer(x))
