"""What the tests of preprocessors share."""

from pathlib import Path

import pytest

from reverie.control import depth, lines, segmentation
from reverie.control.weights import FOLDER
from tests.control.stand_ins import write_all


@pytest.fixture(scope="session")
def annotators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights of every learned preprocessor; read only."""
    folder = tmp_path_factory.mktemp("annotators")
    write_all(folder)
    return folder


@pytest.fixture
def weights(annotators: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, where preprocessors look; their networks see small pictures."""
    monkeypatch.setenv(FOLDER, str(annotators))
    monkeypatch.setattr(lines, "SIDE", 64)
    monkeypatch.setattr(segmentation, "SIDE", 65)
    monkeypatch.setattr(segmentation, "SCENE", 64)
    monkeypatch.setattr(depth, "SIDE", 70)
    return annotators


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights anywhere: an empty folder and an empty cache of the hub."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "annotators"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path
