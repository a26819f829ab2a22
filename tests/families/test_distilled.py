"""What shows that a model was distilled, and what its defaults are then."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from reverie.checkpoint.source import open_weights
from reverie.families.base import Parts
from reverie.families.detect import load_parts
from reverie.families.distilled import distilled
from reverie.families.family import Opened
from tests import tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distilled")


def called(root: Path, name: str, kind: str = "sdxl") -> Parts:
    """The single file of a recipe under another name."""
    path = root / "named" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.hardlink_to(tiny.model_file(root, kind))
    return load_parts(path)


def drawn(parts: Parts) -> tuple[str, str, int, float]:
    d = parts.defaults
    return d.sampler, d.spacing, d.steps, d.guidance_scale


TRAILING = "trailing"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd_xl_turbo_1.0_fp16", ("euler_a", TRAILING, 1, 1.0)),
        ("TurboVisionXL", ("euler_a", TRAILING, 4, 1.0)),
        ("sdxl_lightning_4step", ("euler", TRAILING, 4, 1.0)),
        ("dreamshaperXL_lightning-8-steps", ("euler", TRAILING, 8, 1.0)),
        ("Hyper-SDXL-1step-Unet", ("ddim", TRAILING, 1, 1.0)),
        ("LCM_Dreamshaper", ("lcm", "lcm", 4, 1.0)),
        ("hyperrealism_v2", ("euler", "leading", 50, 5.0)),
        ("falcmix", ("euler", "leading", 50, 5.0)),
    ],
)
def test_names(root: Path, name: str, expected: tuple[str, str, int, float]) -> None:
    parts = called(root, name)
    assert drawn(parts) == expected
    said = [(claim, why) for claim, why in parts.identity.evidence if claim.startswith("distilled")]
    assert bool(said) == (expected[3] == 1.0)
    assert all(why == f"the name {name!r}" for _, why in said)


def test_turbo_was_made_for_smaller_pictures(root: Path) -> None:
    factor = called(root, "sdxl_lightning_4step").vae.config.factor
    assert called(root, "sdxl_lightning_4step").defaults.width == 128 * factor
    assert called(root, "sd_xl_turbo_1.0").defaults.width == 64 * factor


def test_one_step_that_says_x0(root: Path) -> None:
    parts = called(root, "sdxl_lightning_1step_x0")
    assert (parts.parameterisation.name, parts.defaults.steps) == ("sample", 1)
    predictions = [claim for claim, _ in parts.identity.evidence if claim.startswith("prediction")]
    assert predictions == ["prediction sample"]


def test_a_folder_is_drawn_as_its_scheduler_says(root: Path) -> None:
    """By its class; by its name, which leaves the scheduler as it is; by that of the hub's cache."""
    lcm = load_parts(tiny.model(root, "lcm"))
    assert drawn(lcm) == ("lcm", "lcm", 4, 8.0)  # this one is told the guidance scale
    tiny.linked(tiny.model(root, "sdxl"), root / "my-lightning-2step")
    assert drawn(load_parts(root / "my-lightning-2step")) == ("euler", "leading", 2, 1.0)
    cached = root / "models--someone--sdxl-turbo" / "snapshots" / "0123abcd"
    tiny.linked(tiny.model(root, "sdxl"), cached)
    assert drawn(load_parts(cached)) == ("euler", "leading", 1, 1.0)


def test_a_denoising_network_from_elsewhere(root: Path) -> None:
    """SDXL-Lightning is published as a U-Net alone: the base's scheduler is not meant for it."""
    called(root, "sdxl_lightning_2step")
    file = root / "named" / "sdxl_lightning_2step.safetensors"
    parts = load_parts(tiny.model(root, "sdxl"), unet=file)
    assert drawn(parts) == ("euler", TRAILING, 2, 1.0)
    assert (
        "distilled: lightning, 2 steps, without guidance",
        "the denoising network's name 'sdxl_lightning_2step'",
    ) in (parts.identity.evidence)


@pytest.mark.parametrize(("metadata", "title"), [({"modelspec.title": "My Lightning"}, "lightning"), ({}, None)])
def test_metadata(tmp_path: Path, metadata: dict[str, Any], title: str | None) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors", metadata)
    file = open_weights(tmp_path / "plain.safetensors")
    found = distilled(Opened(file.path, "single file", {}, file=file))
    assert (found.way.title if found else None) == title


@pytest.mark.parametrize("name", ["sd3.5_large_turbo"])
def test_rectified_flow_keeps_its_sampler(root: Path, name: str) -> None:
    file = tiny.sd3_file(root, "sd35-large")
    path = root / f"{name}.safetensors"
    path.hardlink_to(file)
    assert drawn(load_parts(path)) == (*drawn(load_parts(file))[:2], 4, 1.0)
