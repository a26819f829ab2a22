"""Compilation, recordings and products in 8 bits on a CUDA device (`-m gpu`)."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import reverie
from reverie.checkpoint.quantised import products_in_bytes
from reverie.checkpoint.quantising import Quantisation, quantised
from reverie.engine.compiling import Compiler
from reverie.engine.recording import Recorded
from reverie.types import Taps
from tests.checkpoint.test_quantising import ERRORS, emulated, numbers
from tests.nets.test_unet import made

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CLOSE = 1e-4  # float32 by other kernels


@pytest.fixture(autouse=True)
def exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))


def inputs(batch: int = 2, size: int = 8, words: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    given = torch.randn(batch, 4, size, size), torch.full((batch,), 300.0), torch.randn(batch, words, 16)
    x, times, context = (t.cuda() for t in given)
    return x, times, context


@torch.no_grad()
def test_a_recording_answers_for_other_numbers_and_shapes() -> None:
    network = made().cuda()
    run = Recorded(network)
    for given in (inputs(), inputs(), inputs(4, 12, 14), inputs()):
        assert (run(*given) - network(*given)).abs().max() < CLOSE
    x, times, context = inputs()
    x[1] = x[0]
    assert (run(x, times, context, taps=Taps(copies=2)) - network(x, times, context)).abs().max() < CLOSE


@torch.no_grad()
def test_compiled_regions_in_a_recording() -> None:
    network = made(block_out_channels=(32, 32), layers_per_block=1).cuda()
    run = Compiler("on", torch.device("cuda")).runner(network)
    for given in (inputs(), inputs(4, 12, 14), inputs()):
        assert (run(*given) - network(*given)).abs().max() < CLOSE


@pytest.mark.parametrize(("kind", "packing"), [("fp8", "F8_E4M3"), ("int8", "I8")])
def test_products_equal_quantise_dequantise(kind: Quantisation, packing: str) -> None:
    if not products_in_bytes(packing, torch.device("cuda")):
        pytest.skip("this card has no such products")
    weight, x = quantised(numbers(64, 128).cuda(), kind), numbers(32, 128, seed=1).cuda()
    assert weight.products
    found, wanted = weight.multiplied(x).double(), emulated(x, weight)
    assert ((found - wanted).abs() / wanted.abs().amax(1, keepdim=True)).max() < (1e-6 if kind == "int8" else 2**-7)


@pytest.mark.parametrize("compiling", ["off", "on"])
def test_pictures_compiled_and_plain_are_near(compiling: str) -> None:
    plain = reverie.load(device="cuda", precision="float32", compile="off").generate("a rocket", seed=3)
    model = reverie.load(device="cuda", precision="float32", compile=compiling)  # type: ignore[arg-type]
    for _ in range(2):  # the second from what the first has recorded
        assert (model.generate("a rocket", seed=3).pixels - plain.pixels).abs().mean() < 1e-3


@pytest.mark.parametrize("kind", list(ERRORS))
def test_quantised_pictures_are_near(kind: Quantisation) -> None:
    exact_one = reverie.load(device="cuda", precision="bfloat16").generate("a rocket", seed=3)
    near = reverie.load(device="cuda", precision="bfloat16", weights=kind).generate("a rocket", seed=3)
    assert (near.pixels - exact_one.pixels).abs().mean() < (0.2 if kind == "int4" else 0.1)
