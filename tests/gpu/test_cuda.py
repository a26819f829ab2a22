"""The same picture on a CUDA device (`-m gpu`)."""

import pytest
import torch

import reverie

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_float32_picture_equals_the_cpu_one() -> None:
    # Noise is drawn on the CPU for every device; what remains is the rounding of other kernels.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    on_cpu = reverie.load(device="cpu").generate("a red apple", seed=3)
    on_gpu = reverie.load(device="cuda", precision="float32").generate("a red apple", seed=3)
    assert (on_cpu.pixels - on_gpu.pixels).abs().max() < 2e-2
    assert (on_cpu.pixels - on_gpu.pixels).abs().mean() < 1e-3


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_is_near(precision: str) -> None:
    exact = reverie.load(device="cuda", precision="float32").generate("a rocket", seed=3)
    half = reverie.load(device="cuda", precision=precision).generate("a rocket", seed=3)  # type: ignore[arg-type]
    assert (exact.pixels - half.pixels).abs().mean() < 5e-2
