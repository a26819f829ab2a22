"""The processor, as far as it matters to how networks are computed: what it multiplies, and with how many cores."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from reverie.nets.ways import onednn_computes


@dataclass(frozen=True)
class Processor:
    """What of the CPU matters.

    Attributes:
        features: names of instruction sets, as `torch.cpu.get_capabilities` has them.
        cores: physical cores that this process may use.
    """

    name: str
    features: frozenset[str]
    cores: int

    @classmethod
    @cache
    def here(cls) -> "Processor":
        """This machine's; without features where torch does not say (before 2.11)."""
        ask: Callable[[], Mapping[str, Any]] | None = getattr(torch.cpu, "get_capabilities", None)
        said = ask() if ask else {}
        features = frozenset(name for name, value in said.items() if value is True)
        name = str(said.get("cpu_name") or said.get("architecture") or torch.backends.cpu.get_cpu_capability())
        return cls(name, features, usable_cores())

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether products of bfloat16 are native and reached by oneDNN: AVX512_BF16, AMX, or ARM's."""
        return bool(self.features & {"avx512_bf16", "amx_bf16", "bf16"}) and onednn_computes(torch.bfloat16)


def usable_cores(
    threads: Sequence[int] | None = None,
    siblings: Callable[[int], str] | None = None,
    quota: Callable[[], str] | None = None,
) -> int:
    """Physical cores among the threads that this process may run on, no more than its share of processor time.

    Two threads of one core (SMT) share the units that multiply.

    Args:
        threads: numbers of logical processors; None for the process's affinity.
        siblings: the text of `thread_siblings_list` of one, which is the same for all of a core; empty where unknown.
        quota: the text of the control group's `cpu.max`.
    """
    threads = _affinity() if threads is None else threads
    siblings, quota = siblings or _siblings, quota or _quota
    cores = len({siblings(number) or str(number) for number in threads})
    allowed, _, period = quota().partition(" ")
    if allowed.isdigit() and period.strip().isdigit():
        cores = min(cores, math.ceil(int(allowed) / int(period)))
    return max(cores, 1)


def _affinity() -> Sequence[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def _siblings(number: int) -> str:
    return _text(Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"))


def _quota() -> str:
    return _text(Path("/sys/fs/cgroup/cpu.max"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def threads_for(cores: int, present: int, environment: Mapping[str, str]) -> int:
    """Threads to compute with: one a physical core, no more than there are now, and as the user says where they do.

    Args:
        present: torch's threads; fewer than cores were asked for by somebody.
        environment: `OMP_NUM_THREADS` and `MKL_NUM_THREADS` are the user's word.
    """
    said = any(environment.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    return present if said else min(present, cores)
