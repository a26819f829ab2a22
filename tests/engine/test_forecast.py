"""Work and memory counted without computing, against published figures and against what is really allocated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from reverie.engine.forecast import KINDS, Tally, Work, counted, to_meta, twin
from reverie.nets.autoencoder import Autoencoder, AutoencoderConfig
from reverie.nets.clip_text import ClipText, ClipTextConfig
from reverie.nets.mmdit import MMDiT, MMDiTConfig
from reverie.nets.unet import UNet, UNetConfig

SDXL = UNetConfig(
    block_out_channels=(320, 640, 1280), attention=(0, 2, 10), heads=(5, 10, 20), context_width=2048, mid_attention=10,
    linear_projection=True, vector="add_embedding", vector_width=2816,
)  # fmt: skip


def _meta(make: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return make()


def _asked(network: Any, *shapes: tuple[int, ...], **named: tuple[int, ...]) -> Work:
    args = [torch.empty(shape, device="meta") for shape in shapes]
    given = {name: torch.empty(shape, device="meta") for name, shape in named.items()}
    return counted(lambda: network(*args, **given))[1]


def test_stable_diffusion_1_takes_what_is_published() -> None:
    """1.607 TFLOP with guidance at 512 pixels: convolutions 0.888, matrix products 0.467, attention 0.252."""
    work = _asked(_meta(lambda: UNet(UNetConfig())), (2, 4, 64, 64), (2,), (2, 77, 768))
    assert work.total / 1e12 == pytest.approx(1.607, abs=5e-4)
    assert [work.flops[kind] / 1e12 for kind in KINDS] == pytest.approx([0.888, 0.467, 0.252], abs=5e-4)


def test_stable_diffusion_xl_takes_what_is_published() -> None:
    work = _asked(_meta(lambda: UNet(SDXL)), (2, 4, 128, 128), (2,), (2, 77, 2048), vector=(2, 2816))
    assert work.total / 1e12 == pytest.approx(13.52, abs=5e-3)


def test_decoding_takes_what_is_published() -> None:
    work = _asked(_meta(lambda: Autoencoder(AutoencoderConfig())).decode, (1, 4, 64, 64))
    assert work.total / 1e12 == pytest.approx(2.515, abs=5e-4)


def _allocated(compute: Callable[[], object]) -> int:
    """Bytes that torch's allocator had given out at most, beyond those before: its own record."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = compute()
    del kept
    results: Any = record.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


SMALL_UNET = UNetConfig(block_out_channels=(32, 64), attention=(1, 0), heads=(8, 8), context_width=64)
SMALL_MMDIT = MMDiTConfig(layers=2, heads=2, context_width=32, vector_width=16)
CASES: dict[str, Callable[[], tuple[nn.Module, str, tuple[Tensor, ...]]]] = {
    "unet": lambda: (UNet(SMALL_UNET), "__call__", (_noise(2, 4, 32, 32), torch.full((2,), 7.0), _noise(2, 77, 64))),
    "odd size": lambda: (UNet(SMALL_UNET), "__call__", (_noise(1, 4, 17, 23), torch.ones(1), _noise(1, 9, 64))),
    "decoder": lambda: (Autoencoder(AutoencoderConfig(block_out_channels=(32, 64))), "decode", (_noise(1, 4, 16, 16),)),
    "encoder": lambda: (Autoencoder(AutoencoderConfig(block_out_channels=(32, 64))), "encode", (_noise(1, 3, 32, 32),)),
    "text": lambda: (ClipText(ClipTextConfig(width=64, inner_width=128, layers=3, heads=2)), "__call__",
                     (torch.arange(154).view(2, 77),)),
    "mmdit": lambda: (MMDiT(SMALL_MMDIT), "__call__",
                      (_noise(2, 16, 16, 16), torch.ones(2), _noise(2, 20, 32), _noise(2, 16))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_memory_is_what_is_allocated(name: str) -> None:
    """Within 10 %, and what kernels take for themselves whatever the size: attention's tiles, 250 KB a thread here."""
    network, method, args = CASES[name]()
    network.eval()
    compute = getattr(network, method)
    compute(*args)  # what is made once
    found = _allocated(lambda: compute(*args))
    there = getattr(twin(network, torch.float32), method)
    _, work = counted(lambda: there(*to_meta(args)))
    assert work.peak <= 1.1 * found
    assert found <= 1.1 * work.peak + 2**18


def test_lifetimes_count() -> None:
    a = torch.empty(100, device="meta")

    def compute() -> Tensor:
        b = a + 1  # 400 bytes
        c = b.view(10, 10).T  # none
        d = c @ c  # 400
        del b, c
        return torch.cat([d, d]) * 2  # 800 twice, the first of them let go

    result, work = counted(compute)
    assert work == Work({"linear": 2 * 10**3}, peak=400 + 1600, kept=800)
    del result


def test_what_is_done_aside_does_not_count() -> None:
    with Tally() as tally:
        with tally.aside():
            kept = torch.ones(1000)
        own = torch.ones(10)
        assert (tally.live, tally.peak) == (40, 40)
        del own
        assert tally.live == 0
    assert len(kept) == 1000


def test_a_device_without_fused_attention_keeps_the_scores() -> None:
    q = torch.empty(1, 2, 256, 16, device="meta")
    fused, plain = (
        counted(lambda: nn.functional.scaled_dot_product_attention(q, q, q), device=device)[1]
        for device in ("cuda", "mps")
    )
    assert fused.total == plain.total == 4 * 2 * 256 * 256 * 16
    assert plain.peak >= 2 * 256 * 256 * 4 > fused.peak


def test_a_twin_has_no_numbers_and_the_same_shapes() -> None:
    network = UNet(SMALL_UNET)
    there = twin(network, torch.bfloat16)
    assert {p.device.type for p in there.parameters()} == {"meta"}
    assert {p.dtype for p in there.parameters()} == {torch.bfloat16}
    assert {n: p.shape for n, p in there.named_parameters()} == {n: p.shape for n, p in network.named_parameters()}
    assert {p.device.type for p in network.parameters()} == {"cpu"}
