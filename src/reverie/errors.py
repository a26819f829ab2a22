"""The errors of Reverie: each message is one line that says what was found, what was expected and what to do."""

import difflib
from collections.abc import Collection, Sequence

SHOWN = 80  # characters of a value in a message


class ReverieError(Exception):
    """Anything that Reverie reports on purpose. The command line prints it as one line."""

    exit_code = 1


class InputError(ReverieError):
    """The user gave something that cannot work: a value, a file, a place to write. Exit code 2."""

    exit_code = 2


class RequestError(InputError):
    """A field of a request is out of range or names something that does not exist."""


class CheckpointError(InputError):
    """A checkpoint is missing, broken, hostile or not of a known family."""


class OutputError(InputError):
    """A result cannot be written where it was asked for."""


class ConfigError(InputError):
    """A training configuration or data set cannot be used."""


class GenerationError(ReverieError):
    """The mathematics failed on the way (for example NaN in the latents). Exit code 1."""


def unknown(kind: str, name: str, known: Collection[str], within: Sequence[str] = ()) -> str:
    """The message for a name that is none of those known: `unknown field 'step'; did you mean steps?`, or all of them.

    Args:
        kind: what such a name is of, `field` or `setting`.
        within: the groups that it stands in.
    """
    near = difflib.get_close_matches(name, known, n=1)
    every = f"{kind}s{f' of {within[0]}' if within else ''} are {', '.join(known) or 'none'}"
    return f"unknown {kind} {'.'.join([*within, name])!r}; {f'did you mean {near[0]}?' if near else every}"


def unfit(name: str, found: object, why: str) -> str:
    """The message for a value that a field refuses: `steps is 0: input should be greater than or equal to 1`."""
    shown = repr(found)
    return f"{name} is {shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + '...'}: {why[0].lower()}{why[1:]}"
