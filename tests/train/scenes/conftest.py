from pathlib import Path

import pytest

from tests.train.scenes.world import write_world


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("sprites"))
