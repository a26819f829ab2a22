"""Who else uses the machine while something is measured."""

import os
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
QUIET = 0.05  # of the processors' time used by others: above, a figure is marked


@dataclass(frozen=True)
class Jiffies:
    """Time of all processors since the machine was started, in seconds: at work, and taken by the hypervisor."""

    busy: float
    stolen: float

    @classmethod
    def now(cls) -> "Jiffies | None":
        """None where the system does not say."""
        return cls.read(STAT.read_text(encoding="ascii")) if STAT.exists() else None

    @classmethod
    def read(cls, text: str, tick: int | None = None) -> "Jiffies":
        """The first line of `/proc/stat`: user, nice, system, idle, iowait, irq, softirq, steal."""
        values = [int(value) for value in text.splitlines()[0].split()[1:9]]
        user, nice, system, _, _, irq, soft, steal = values
        tick = tick or os.sysconf("SC_CLK_TCK")
        return cls((user + nice + system + irq + soft) / tick, steal / tick)


def foreign(before: Jiffies | None, after: Jiffies | None, own: float, seconds: float) -> float | None:
    """The share of all processors' time that others used, the hypervisor among them; None where it is not known.

    Args:
        own: seconds of processors that the measured process took.
        seconds: by the clock.
    """
    if before is None or after is None or seconds <= 0:
        return None
    others = after.busy - before.busy - own + after.stolen - before.stolen
    return min(max(others / (seconds * (os.cpu_count() or 1)), 0.0), 1.0)
