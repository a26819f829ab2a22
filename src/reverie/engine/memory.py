"""What to do when memory runs out: the next cheaper way, said aloud, never a crash that loses the picture."""

import gc
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from reverie.errors import GenerationError

T = TypeVar("T")
SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: CUDA's, MPS's and the CPU allocator's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def available(device: torch.device) -> int:
    """Bytes of memory that are free, or would be if caches gave way; 0 where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    except (OSError, ValueError, StopIteration):
        return 0


def frugally(what: str, ways: Sequence[tuple[str, Callable[[], T]]]) -> T:
    """Try `ways` in order, the cheapest last; each is a name and a function. A fall back is a warning.

    Raises:
        GenerationError: memory ran out in all of them.
    """
    for i, (name, way) in enumerate(ways):
        try:
            return way()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        _release()
        if i + 1 < len(ways):
            warnings.warn(f"{what} {name}: memory ran out; now {ways[i + 1][0]}", stacklevel=2)
    raise GenerationError(f"{what}: memory ran out, even {ways[-1][0]}; draw a smaller picture or fewer at once")


def _release() -> None:
    """Give back what the failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
