"""The errors of Reverie: each message is one line that says what was found, what was expected and what to do."""


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
