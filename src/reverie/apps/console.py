"""What the command line prints: progress, errors, tables. Progress and messages go to stderr, results to stdout."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def error(message: str) -> None:
    """One line on stderr."""
    err.print(Text("error: ", style="bold red") + Text(" ".join(message.split())))


def note(message: str) -> None:
    """One line on stderr."""
    err.print(Text(message, style="dim"))


def print_json(value: Any) -> None:
    """JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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
    """A progress line with steps per second and remaining time; it vanishes when the work is done."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), SpeedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
