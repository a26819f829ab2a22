"""What the tests of the command line share."""

from pathlib import Path

import pytest

from tests.apps import models
from tests.apps.commandline import CommandLine


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def folder(shared: Path) -> Path:
    """A tiny model as a diffusers folder; read only."""
    return models.folder(shared / "tiny")


@pytest.fixture(scope="session")
def single(shared: Path) -> Path:
    """A tiny model as a single file in the LDM layout; read only."""
    return models.single(shared / "tiny-ldm.safetensors")
