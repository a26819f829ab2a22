"""What drawing took in the end: seconds and memory, to be compared with the plan."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

STATUS = Path("/proc/self/status")
EVERY = 0.005  # seconds between two looks


@dataclass(frozen=True)
class Used:
    """What was used at most beside what the program had before.

    Attributes:
        own: bytes of the device, or on a CPU of the program's own memory; None where the system does not say.
        mapped: bytes of mapped files in memory, which the system could take back; 0 beside a device.
    """

    seconds: float
    own: int | None
    mapped: int | None


class Usage:
    """Watches what is used between `with` and its end; `used` afterwards says it.

    On a CPU a thread looks at what the system says (Linux), so that what comes and goes between two looks is missed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._over = device, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._peak: tuple[int, int] | None = None
        self.used = Used(0.0, None, None)

    def __enter__(self) -> "Usage":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._begun: tuple[int, int] | None = (torch.cuda.memory_allocated(self._device), 0)
        else:
            self._begun = resident()
            if self._begun is not None and self._device.type == "cpu":
                self._thread.start()
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._peak = (torch.cuda.max_memory_allocated(self._device), 0)
        seconds = time.perf_counter() - self._started
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._peak is None or self._begun is None:
            self.used = Used(seconds, None, None)
            return
        own, mapped = (max(most - first, 0) for most, first in zip(self._peak, self._begun, strict=True))
        self.used = Used(seconds, own, mapped)

    def _watch(self) -> None:
        while True:
            now = resident()
            if now is not None:
                own, mapped = self._peak or (0, 0)
                self._peak = (max(own, now[0]), max(mapped, now[1]))
            if self._over.wait(EVERY):
                return


def resident() -> tuple[int, int] | None:
    """Bytes of this process in memory: its own, and of mapped files; None where the system does not say."""
    try:
        lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        found = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Rss")}
        return found["RssAnon"], found["RssFile"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
