"""Tiny models of every family, made once for the tests of this folder."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `tiny.model` and its like put what they make."""
    return tmp_path_factory.mktemp("models")
