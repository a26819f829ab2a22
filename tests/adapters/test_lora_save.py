"""LoRA files that are written: read again as they were, with the metadata that other programs look for."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from reverie.adapters.deltas import Delta, LoRA, assembled
from reverie.adapters.lora import Adapter, open_adapter
from reverie.adapters.lora_save import save_lora
from reverie.errors import OutputError, RequestError
from reverie.families.base import Parts
from tests.adapters.loras import parts_of

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
ROWS = 32


def random_deltas(parts: Parts, every: int = 7) -> dict[str, dict[str, Delta]]:
    """Of every so manieth layer of each network: linear, convolutions, of mixed ranks, with and without alpha."""
    found: dict[str, dict[str, Delta]] = {}
    draw = torch.Generator().manual_seed(0)
    for part, network in parts.modules().items():
        layers = [(path, m) for path, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for n, (path, layer) in enumerate(layers[::every] if part != "vae" else ()):
            delta = LoRA.fresh(layer.weight.shape, 2 + n % 2, [None, 1.0, 3.0][n % 3], draw)
            own = found.setdefault(part, {})
            own[path] = delta.mapped(lambda t: torch.randn(t.shape, generator=draw))
    return found


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def agree(adapter: Adapter, deltas: dict[str, dict[str, Delta]], parts: Parts, tolerance: float) -> None:
    assert adapter.coverage.whole
    assert {p: set(own) for p, own in adapter.deltas.items()} == {p: set(own) for p, own in deltas.items()}
    for part, own in deltas.items():
        for path, delta in own.items():
            weight = parts.modules()[part].get_submodule(path).weight
            assert isinstance(weight, Tensor)
            found = adapter.deltas[part][path].difference(weight, 1.0)
            assert (found - delta.difference(weight, 1.0)).abs().max() <= tolerance, path


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "refiner", "sd35-medium"])
@pytest.mark.parametrize(("dialect", "tolerance"), [("kohya", 0.0), ("diffusers", 1e-5)])
def test_round_trip(root: Path, tmp_path: Path, kind: str, dialect: str, tolerance: float) -> None:
    """kohya's to the bit; diffusers' but for the rounding of the scale."""
    parts = parts_of(root, kind)
    deltas = random_deltas(parts)
    save_lora(deltas, tmp_path / "my.safetensors", parts, dialect=dialect)
    agree(open_adapter(tmp_path / "my.safetensors", parts), deltas, parts, tolerance)


def test_metadata(root: Path, tmp_path: Path) -> None:
    parts = parts_of(root, "sd1")
    path = tmp_path / "my style.safetensors"
    save_lora(random_deltas(parts), path, parts, metadata={"ss_tag_frequency": "{}", "modelspec.title": "Mine"})
    told = metadata_of(path)
    assert told["ss_output_name"] == "my style"
    assert told["modelspec.title"] == "Mine"
    assert told["ss_network_module"] == "networks.lora"
    assert told["ss_network_dim"] in {"2", "3"}
    raw = path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert told["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert told["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    adapter = open_adapter(path, parts)
    assert adapter.alias == "my style"
    assert adapter.short == hashlib.sha256(data).hexdigest()[:12]
    assert adapter.digest == hashlib.sha256(raw).hexdigest()


def test_hash_without_metadata_is_that_of_the_data(root: Path, tmp_path: Path) -> None:
    """What A1111 computes where a trainer wrote none."""
    parts = parts_of(root, "sd1")
    path = tmp_path / "a.safetensors"
    save_lora(random_deltas(parts), path, parts, metadata={"sshs_model_hash": "none"})
    raw = path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert open_adapter(path, parts).short == hashlib.sha256(data).hexdigest()[:12]


@pytest.mark.parametrize(
    ("width", "prediction", "version", "architecture"),
    [
        (768, "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        (1024, "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        (1024, "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        (2048, "epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_base_model(root: Path, tmp_path: Path, width: int, prediction: str, version: str, architecture: str) -> None:
    """By the width of the prompt, here of a config alone."""
    parts = parts_of(root, "sd1")
    unet = nn.Module.__new__(type(parts.unet))
    unet.__dict__ = {**parts.unet.__dict__, "config": replace(parts.unet.config, context_width=width)}
    wide = replace(parts, unet=unet, identity=replace(parts.identity, prediction=prediction))
    save_lora({"unet": {LAYER: LoRA.fresh((ROWS, ROWS), 2)}}, tmp_path / "a.safetensors", wide)
    told = metadata_of(tmp_path / "a.safetensors")
    assert (told["ss_base_model_version"], told["modelspec.architecture"]) == (version, architecture)
    assert told["modelspec.prediction_type"] == ("v" if prediction == "v_prediction" else "epsilon")


def test_precision(root: Path, tmp_path: Path) -> None:
    parts = parts_of(root, "sd1")
    path = tmp_path / "a.safetensors"
    save_lora(random_deltas(parts), path, parts, dtype=torch.float16)
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float16}


def test_other_algorithms(root: Path, tmp_path: Path) -> None:
    """kohya's dialect has names for all; diffusers' for LoRA and DoRA alone, and says so."""
    parts = parts_of(root, "sd1")
    lora = {"lora_down.weight": torch.randn(2, ROWS), "lora_up.weight": torch.randn(ROWS, 2)}
    hada = {f"hada_w{i}_{a}": torch.randn((ROWS, 2) if a == "a" else (2, ROWS)) for i in "12" for a in "ab"}
    groups = {
        "dora": lora | {"dora_scale": torch.rand(ROWS, 1)},
        "loha": hada,
        "diff": {"diff": torch.randn(ROWS, ROWS)},
    }
    for name, tensors in groups.items():
        deltas = {"unet": {LAYER: assembled(tensors, 1.0, (ROWS, ROWS))}}
        path = tmp_path / f"{name}.safetensors"
        save_lora(deltas, path, parts)
        agree(open_adapter(path, parts), deltas, parts, 0.0)
        if name == "dora":
            save_lora(deltas, path, parts, dialect="diffusers")
            agree(open_adapter(path, parts), deltas, parts, 1e-5)
            assert json.loads(metadata_of(path)["lora_adapter_metadata"])["unet.use_dora"] is True
        else:
            with pytest.raises(RequestError, match="diffusers has no names"):
                save_lora(deltas, path, parts, dialect="diffusers")


def test_bad_requests(root: Path, tmp_path: Path) -> None:
    parts = parts_of(root, "sd1")
    good = {"unet": {LAYER: LoRA.fresh((ROWS, ROWS), 2)}}
    path = tmp_path / "a.safetensors"
    with pytest.raises(RequestError, match="no change"):
        save_lora({}, path, parts)
    with pytest.raises(RequestError, match="no layer 'x' in 'unet'"):
        save_lora({"unet": {"x": good["unet"][LAYER]}}, path, parts)
    with pytest.raises(RequestError, match="unknown LoRA dialect"):
        save_lora(good, path, parts, dialect="webui2")
    with pytest.raises(OutputError):
        save_lora(good, tmp_path / "no folder" / "a.safetensors", parts)
    assert list(tmp_path.iterdir()) == []
