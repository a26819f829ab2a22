"""Every configuration of the recipes is one that `reverie train` reads."""

from pathlib import Path
from typing import Any

import pytest

from reverie.train.config import AutoencoderRun, ControlRun, DiffusionRun, JudgeRun, LoraRun, read_config

FOLDER = Path(__file__).parents[2] / "recipes"
KINDS: dict[str, Any] = {
    "autoencoder": AutoencoderRun, "diffusion": DiffusionRun, "few": DiffusionRun, "further": DiffusionRun,
    "pairs": DiffusionRun, "composed": DiffusionRun,
    "judge": JudgeRun, "lora": LoraRun, "control": ControlRun,
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.toml")), ids=lambda path: path.stem)
def test_it_is_read(path: Path) -> None:
    kind = next(KINDS[word] for word in path.stem.split("_") if word in KINDS)
    assert isinstance(read_config(kind, path), kind)
