"""Python's garbage collector, out of the way."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """Look for no garbage where thousands of objects are made that all stay.

    A pass looks at every object there is, a tenth of a second after torch was imported, and would find nothing. For
    functions as a decorator, too; one inside another changes nothing.
    """
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if active:
            gc.enable()
