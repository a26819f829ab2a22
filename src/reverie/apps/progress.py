"""Progress lines, on stderr. Apart from `console`, so that `--help` does not pay for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from reverie.apps.console import err


class SpeedColumn(ProgressColumn):
    """Steps per second, or seconds per step where it is slower than that."""

    def render(self, task: Task) -> Text:
        """One cell."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f} step/s" if speed >= 1 else f"{1 / speed:.1f} s/step", style="cyan")


@contextmanager
def steps_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress line with steps per second and remaining time; it vanishes when the work is done.

    Only for a terminal: a log file gets no line of it, and the error of a failed run stays one line.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), SpeedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
