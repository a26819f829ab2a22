"""What a run tells about itself: one JSON line a step, and the same numbers for TensorBoard."""

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from reverie.checkpoint.save import write_atomically
from reverie.errors import ConfigError

LOG, EVENTS = "log.jsonl", "events"


class Journal:
    """The log of a run, open while it trains.

    Args:
        out: the run's folder; the log is `log.jsonl` in it, TensorBoard's files are below `events`.
        step: where the run goes on. It forgets what a run that died had logged of later steps.
        tensorboard: whether there is the second.

    Raises:
        ConfigError: TensorBoard is wanted and not installed.
    """

    def __init__(self, out: Path, step: int, *, tensorboard: bool) -> None:
        _forget_after(out / LOG, step)
        self._file = (out / LOG).open("a", encoding="utf-8", buffering=1)  # by lines, for those who watch
        self._events: Any = _writer(out / EVENTS, step) if tensorboard else None

    def step(self, step: int, numbers: dict[str, float]) -> None:
        """Write the numbers of one step."""
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Onto the disk, as a checkpoint is written."""
        self._file.flush()
        if self._events is not None:
            self._events.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("tensorboard = true needs TensorBoard: pip install 'reverie[train]'") from None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _forget_after(log: Path, step: int) -> None:
    """A run that died between checkpoints logged steps that will be taken again."""
    if log.exists():
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        write_atomically(log, lambda p: p.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8"))


def _step(line: str) -> int:
    """The step of a line of the log; a line cut short by a crash counts as later than all."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize
