"""What a processor is seen to be: cores are counted once however many threads they have, and what users say holds."""

import pytest
import torch

from reverie.engine import processor
from reverie.engine.processor import Processor, threads_for, usable_cores

PAIRS = {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5", 2: "2,6", 6: "2,6"}


@pytest.mark.parametrize(
    ("threads", "quota", "cores"),
    [
        ([0, 1, 2, 4, 5, 6], "max 100000", 3),
        ([0, 4], "max 100000", 1),
        ([0, 1], "", 2),
        ([0, 1, 2, 4, 5, 6], "200000 100000", 2),
        ([0, 1, 2, 4, 5, 6], "150000 100000", 2),
        ([0], "50000 100000", 1),
        ([0, 1], "nonsense", 2),
    ],
)
def test_cores(threads: list[int], quota: str, cores: int) -> None:
    assert usable_cores(threads, lambda number: PAIRS[number], lambda: quota) == cores


def test_without_a_topology_every_thread_is_a_core() -> None:
    assert usable_cores([0, 1, 2], lambda _: "", lambda: "") == 3


@pytest.mark.parametrize(
    ("cores", "present", "environment", "threads"),
    [
        (4, 8, {}, 4),
        (4, 2, {}, 2),  # somebody asked torch for fewer
        (4, 8, {"OMP_NUM_THREADS": "8"}, 8),
        (4, 8, {"MKL_NUM_THREADS": "6"}, 8),
        (4, 8, {"OMP_NUM_THREADS": ""}, 4),
    ],
)
def test_threads(cores: int, present: int, environment: dict[str, str], threads: int) -> None:
    assert threads_for(cores, present, environment) == threads


@pytest.mark.parametrize(
    ("features", "native"),
    [
        (set(), False), ({"avx2", "avx512_f", "avx512_vnni"}, False), ({"avx512_bf16"}, True), ({"amx_bf16"}, True),
        ({"neon", "bf16"}, True), ({"neon"}, False),
    ],
)  # fmt: skip
def test_native_bfloat16(features: set[str], native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Processor("some", frozenset(features), 2)
    monkeypatch.setattr(processor, "onednn_computes", lambda dtype: dtype == torch.bfloat16)
    assert here.multiplies_bfloat16 is native
    monkeypatch.setattr(processor, "onednn_computes", lambda dtype: False)  # torch cannot reach the units
    assert not here.multiplies_bfloat16


def test_this_machine() -> None:
    here = Processor.here()
    assert here.name and here.cores >= 1


def test_an_older_torch_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    here = Processor.here.__wrapped__(Processor)
    assert here.name == torch.backends.cpu.get_cpu_capability()
    assert not here.features and not here.multiplies_bfloat16
