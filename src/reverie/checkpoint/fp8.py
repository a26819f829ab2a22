"""Weights in 8-bit floats with a scale, as ComfyUI's scaled files keep them.

`<layer>.weight` is in float8_e4m3fn or float8_e5m2 and stands for `weight * scale`, with the scale in
`<layer>.scale_weight` (a file with the marker tensor `scaled_fp8`) or in `<layer>.weight_scale` (newer files, where
`<layer>.comfy_quant` holds the name of the format as JSON). `scale_input` and `input_scale` are for matrix products in
8 bits and do not change the weights. Format: ComfyUI `QUANTIZATION.md`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace

import torch

from reverie.checkpoint.quantised import PACKINGS
from reverie.checkpoint.weightfile import TensorInfo, WeightFile, shown, shown_shape
from reverie.errors import CheckpointError

SCALES = ("scale_weight", "weight_scale")
INPUT_SCALES = ("scale_input", "input_scale")
MARKER = "scaled_fp8"
FORMAT = "comfy_quant"
FORMATS = ("float8_e4m3fn", "float8_e5m2")
MAX_FORMAT = 10_000  # bytes
NUMBERS = (torch.float32, torch.float16, torch.bfloat16)


def unscaled(file: WeightFile) -> WeightFile:
    """The same file with every scaled weight as one tensor of float32, and without the names that say how.

    A file without scales is returned as it is, also where its weights are in 8 bits.

    Raises:
        CheckpointError: a scale that does not fit its weight, or another format of ComfyUI.
    """
    tensors = dict(file.tensors)
    for name in file.tensors:
        layer, _, last = name.rpartition(".")
        if last == FORMAT and layer:
            _check_format(file, name)
            del tensors[name]
        elif last == MARKER and tensors[name].dtype in PACKINGS and tensors[name].count <= 2:
            del tensors[name]
        elif last in SCALES:
            _fold(file, tensors, f"{layer}.weight" if layer else "weight", name)
    return file if len(tensors) == len(file.tensors) else replace(file, tensors=tensors)


def _fold(file: WeightFile, tensors: dict[str, TensorInfo], weight: str, name: str) -> None:
    """Take a scale out of the table and into its weight."""
    info, scale = tensors.get(weight), file.tensors[name]
    if info is None or info.dtype not in PACKINGS:  # a scale of something else
        return
    rows = (info.shape[0], *[1] * (len(info.shape) - 1)) if info.shape else ()
    if scale.dtype not in NUMBERS or not (scale.count == 1 or scale.shape in (rows, rows[:1])):
        raise CheckpointError(
            f"{file.path}: the scale {shown(name)} of shape {shown_shape(scale.shape)} does not fit its weight "
            f"of shape {shown_shape(info.shape)}; one number, or one a row, is read"
        )
    tensors[weight] = replace(info, dtype=torch.float32, packing=PACKINGS[info.dtype], scale=scale)
    layer = name.rpartition(".")[0]
    for used in (name, *(f"{layer}.{other}" for other in INPUT_SCALES)):
        tensors.pop(used, None)


def _check_format(file: WeightFile, name: str) -> None:
    """Formats of ComfyUI other than 8-bit floats (int8, nvfp4, mxfp8) are not read."""
    info = file.tensors[name]
    value: object = None
    if info.dtype == torch.uint8 and info.count <= MAX_FORMAT:
        try:
            value = json.loads(bytes(file.tensor(name).flatten().tolist()))
        except (ValueError, RecursionError):
            value = None
    kind = value.get("format") if isinstance(value, Mapping) else None
    if kind not in FORMATS:
        raise CheckpointError(
            f"{file.path}: {shown(name)} says that the layer is quantised as {shown(str(kind))}; "
            f"{', '.join(FORMATS)} are read"
        )
