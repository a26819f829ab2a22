"""Pictures of models whose weights are quantised as they are opened."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reverie
from reverie.checkpoint.packed import PackedTensor, is_packed
from reverie.checkpoint.quantising import Quantisation
from reverie.engine.bundle import Model
from reverie.engine.image import fingerprint
from tests.apps import models
from tests.engine import test_adapters

# Relative error of latents after two steps with random weights: some times that of the weights.
ERRORS: dict[Quantisation, float] = {"fp8": 0.15, "int8": 0.05, "int4": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.folder(tmp_path_factory.mktemp("quantised") / "tiny")


def opened(folder: Path, weights: Any, **more: Any) -> Model:
    return reverie.load(folder, device="cpu", precision="float32", weights=weights, **more)


def latents(model: Model, **fields: Any) -> Tensor:
    usual: dict[str, Any] = {"steps": 2, "seed": 3, "sampler": "euler"}
    return model.generate("a red apple", **usual | fields).latents


def off(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def memory(module: nn.Module) -> int:
    return sum(p.packed.nbytes if isinstance(p, PackedTensor) else p.nbytes for p in module.parameters())


@pytest.mark.parametrize("kind", list(ERRORS))
def test_pictures_are_near_and_weights_small(folder: Path, kind: Quantisation) -> None:
    exact, model = opened(folder, "full"), opened(folder, kind)
    error = off(latents(model), latents(exact))
    assert 0 < error < ERRORS[kind]
    whole, small = (memory(one.network("unet")) for one in (exact, model))
    assert small < (0.5 if kind == "int4" else 0.6) * whole  # the ends of so small a network are a third of it
    assert is_packed(model.ready("text_encoder", model.parts.text_encoder)) and not is_packed(model.network("vae"))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_one_part_at_a_time_draws_the_same(folder: Path, kind: str) -> None:
    """Weights go back to those of the file and are quantised again."""
    assert torch.equal(latents(opened(folder, kind, offload=True)), latents(opened(folder, kind)))


def test_products_in_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with VNNI: inputs are rounded, too, so that the error is larger, but not by much."""
    exact, found = latents(opened(folder, "full")), []
    for native in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda native=native: native)
        found.append(latents(opened(folder, "int8")))
    unpacking, multiplying = found
    assert not torch.equal(multiplying, unpacking)
    assert off(multiplying, exact) < 2 * ERRORS["int8"]


def test_loras_go_beside_quantised_weights(folder: Path, tmp_path: Path) -> None:
    path = test_adapters.lora(tmp_path / "a.safetensors", "lora", 0, folder)
    loras = {"loras": [{"path": str(path)}]}
    exact, model = opened(folder, "full"), opened(folder, "int8")
    wanted = latents(exact, **loras)
    assert off(latents(model, **loras), wanted) < off(latents(exact), wanted) / 3
    assert torch.equal(latents(model), latents(opened(folder, "int8")))  # and leave no trace


def test_pictures_say_how_weights_were_kept(folder: Path) -> None:
    assert fingerprint(opened(folder, "int4"))["weights"] == "int4"
    assert "weights" not in fingerprint(opened(folder, "packed"))
