"""Where a user's own files are, as the XDG Base Directory Specification has it."""

import os
from collections.abc import Mapping
from pathlib import Path


def user_cache(environment: Mapping[str, str] | None = None) -> Path:
    """Files that can be made again: `XDG_CACHE_HOME`, else `~/.cache`.

    Args:
        environment: where to look the variable up; None is the process's own.
    """
    return _home(environment, "XDG_CACHE_HOME", "~/.cache")


def user_config(environment: Mapping[str, str] | None = None) -> Path:
    """Settings: `XDG_CONFIG_HOME`, else `~/.config`."""
    return _home(environment, "XDG_CONFIG_HOME", "~/.config")


def _home(environment: Mapping[str, str] | None, variable: str, usual: str) -> Path:
    env = os.environ if environment is None else environment
    return Path(env.get(variable) or usual).expanduser()
