"""Memory that runs out means the next cheaper way, said aloud."""

import subprocess
import sys

import pytest
import torch

import reverie
from reverie.engine.memory import frugally, is_out_of_memory
from reverie.errors import GenerationError
from reverie.nets import attention
from tests.apps.commandline import environment


def _fails(error: BaseException) -> int:
    raise error


def test_the_first_way_that_fits_is_taken_and_the_others_are_told() -> None:
    ways = [
        ("whole", lambda: _fails(MemoryError())),
        ("in tiles", lambda: _fails(torch.OutOfMemoryError())),
        ("slowly", lambda: 3),
    ]
    with pytest.warns(UserWarning) as told:
        assert frugally("decoding", ways) == 3
    assert [str(w.message) for w in told] == [
        "decoding whole: memory ran out; now in tiles",
        "decoding in tiles: memory ran out; now slowly",
    ]


def test_when_nothing_fits_it_is_one_clear_line() -> None:
    with pytest.raises(GenerationError, match="decoding: memory ran out, even whole; draw a smaller picture"):
        frugally("decoding", [("whole", lambda: _fails(MemoryError()))])


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        frugally("decoding", [("whole", lambda: _fails(RuntimeError("shapes do not match"))), ("tiles", lambda: 1)])


def test_the_allocator_of_the_cpu_is_understood() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**45, dtype=torch.float64)
    assert is_out_of_memory(error.value)


LIMITED = """
import resource, sys, warnings
import torch, reverie
from reverie.engine.request import Request
model = reverie.load(device="cpu", precision="float32")
model.decode(torch.zeros(1, 4, 16, 16), Request())
size = int(sys.argv[1])
z = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0))
used = int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmSize"))) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]) * 2**20,) * 2)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    pixels = model.decode(z, Request())
print(tuple(pixels.shape), bool(torch.isfinite(pixels).all()), [str(w.message) for w in told])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_real_limit_makes_it_decode_in_tiles() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "256", "420"], capture_output=True, text=True, timeout=120, check=True,
        env=environment() | {"MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert "(1, 3, 1024, 1024) True" in done.stdout
    assert "decoding in one piece: memory ran out; now in tiles of 512 pixels" in done.stdout


def test_offloading_keeps_one_part_in_place_and_draws_the_same() -> None:
    model, frugal = reverie.load(device="cpu"), reverie.load(device="cpu", offload=True)
    want, got = (m.generate("a red apple", seed=1, steps=2, upscaler="none").pixels for m in (model, frugal))
    assert torch.equal(got, want)
    assert {name for _, name in model._residents.placed} == {"text_encoder", "unet", "vae"}
    assert {name for _, name in frugal._residents.placed} == {"vae"}


def test_attention_in_slices_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n)) for n in (37, 21, 21))
    whole = attention.attention(q, k, v)
    monkeypatch.setattr(attention, "MOST_SCORES", 2 * 3 * 21 * 5)
    assert (attention.attention(q, k, v) - whole).abs().max() < 1e-6
