"""Tiny models of every family, made once for the tests of this folder."""

from pathlib import Path
from typing import Any

import pytest

from reverie.adapters.control_files import ControlFile, open_control
from reverie.families.base import Parts
from tests import tiny
from tests.adapters import controls


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `tiny.model` and its like put what they make."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def sd1(root: Path) -> Parts:
    """Stable Diffusion 1."""
    return controls.parts_of(tiny.model(root, "sd1", merges_kept=500))


@pytest.fixture(scope="module")
def sd3(root: Path) -> Parts:
    """Stable Diffusion 3."""
    return controls.parts_of(tiny.sd3_model(root, "sd3-without-t5", merges_kept=500))


@pytest.fixture(scope="module")
def net(root: Path, sd1: Parts) -> Any:
    """A ControlNet of diffusers for `sd1`."""
    return controls.sd1_control(root)


@pytest.fixture(scope="module")
def file(root: Path, sd1: Parts, net: Any) -> ControlFile:
    """The same, opened."""
    return open_control(root / "control", sd1)
