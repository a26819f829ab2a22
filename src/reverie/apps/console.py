"""What the command line prints: errors, notes, results. Progress and messages go to stderr, results to stdout."""

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from reverie.collector import paused_collector

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def error(message: str) -> None:
    """One line on stderr."""
    err.print(Text("error: ", style="bold red") + Text(" ".join(message.split())))


def note(message: str) -> None:
    """One line on stderr."""
    err.print(Text(message, style="dim"))


def busy(title: str) -> AbstractContextManager[object]:
    """A spinner for work whose length is not known; it vanishes when the work is done."""
    return err.status(title)


@contextmanager
def starting() -> Iterator[None]:
    """A spinner while torch is imported; what that makes stays, so that meanwhile no garbage is looked for."""
    if "torch" in sys.modules:
        with busy("starting"):
            yield
        return
    with paused_collector():
        try:
            with busy("starting"):
                yield
        finally:
            gc.freeze()


def print_json(value: Any) -> None:
    """JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_event(event: str, **facts: Any) -> None:
    """One JSON object on one line of stdout, at once: a program follows what happens."""
    sys.stdout.write(json.dumps({"event": event, **facts}, ensure_ascii=False) + "\n")
    sys.stdout.flush()
