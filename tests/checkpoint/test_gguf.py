"""GGUF files: equal to the reference library on what it writes, one clear line on everything else."""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.checkpoint.gguf import PACKED, STORED, UNREAD
from reverie.checkpoint.quantised import BLOCKS, QuantisedTensor
from reverie.checkpoint.source import WeightFile, open_weights
from reverie.errors import CheckpointError

NUMBERS = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I8": np.int8, "I16": np.int16, "I32": np.int32}
QUANTISES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # the library cannot write the others; random blocks serve


def written(path: Path, fill: Callable[[gguf.GGUFWriter], object], architecture: str = "sd1") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_types_are_those_of_the_library() -> None:
    known = {**PACKED, **UNREAD, **{k: str(v).removeprefix("torch.") for k, v in STORED.items()}}
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
    for kind, name in known.items():
        expected = GGMLQuantizationType(kind).name
        assert names.get(name, name.replace("int", "I")) == expected


@pytest.mark.parametrize("packing", BLOCKS)
def test_packed_tensors(packing: str, tmp_path: Path) -> None:
    block = BLOCKS[packing]
    numbers = np.random.default_rng(0).standard_normal((6, block.elements * 2), dtype=np.float32)
    if packing in QUANTISES:
        data = gguf.quants.quantize(numbers, GGMLQuantizationType[packing])
    else:
        data = np.random.default_rng(0).integers(0, 120, (6, 2 * block.size), dtype=np.uint8)
    path = written(
        tmp_path / "a.gguf", lambda w: w.add_tensor("x.weight", data, raw_dtype=GGMLQuantizationType[packing])
    )
    file = open_weights(path)
    assert file.format == "gguf"
    assert file.tensors["x.weight"].shape == (6, 2 * block.elements)
    assert file.tensors["x.weight"].dtype == torch.float32
    assert file.tensors["x.weight"].packing == packing
    expected = gguf.quants.dequantize(data, GGMLQuantizationType[packing])
    assert np.array_equal(file.tensor("x.weight").numpy(), expected, equal_nan=True)
    raw = file.raw("x.weight")
    assert isinstance(raw, QuantisedTensor)
    assert raw.nbytes == data.nbytes
    assert bytes(raw.data.numpy()) == data.tobytes()
    if packing in QUANTISES:  # rounding error of 4 to 8 bits of numbers of about 3 sigma
        assert np.abs(file.tensor("x.weight").numpy() - numbers).max() < 0.4


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 3, 4), (5, 1, 3, 3)], ids=str)
def test_stored_tensors(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    data = (np.random.default_rng(0).standard_normal(shape) * 100).astype(NUMBERS[name])
    file = open_weights(written(tmp_path / "a.gguf", lambda w: w.add_tensor("x", data)))
    assert np.array_equal(file.tensor("x").numpy(), data)
    assert file.tensors["x"].packing is None
    start = torch.frombuffer(file._map, dtype=torch.uint8).data_ptr()
    assert start < file.tensor("x").data_ptr() < start + len(file._map)


def test_bfloat16_is_stored(tmp_path: Path) -> None:
    numbers = torch.randn(3, 5).bfloat16()
    data = numbers.view(torch.uint16).numpy()
    kind = GGMLQuantizationType.BF16
    file = open_weights(written(tmp_path / "a.gguf", lambda w: w.add_tensor("x", data.view(np.uint8), raw_dtype=kind)))
    assert torch.equal(file.tensor("x"), numbers)


def test_several_tensors_and_metadata(tmp_path: Path) -> None:
    def fill(w: gguf.GGUFWriter) -> None:
        w.add_name("mine \n ü")
        w.add_uint32("general.quantization_version", 2)
        w.add_float32("a.f", 0.5)
        w.add_bool("a.b", True)
        w.add_int64("a.i", -7)
        w.add_array("a.few", [1, 2, 3])
        w.add_array("a.texts", ["x", "y"])
        w.add_array("a.many", list(range(1000)))
        w.add_array("a.words", [str(i) for i in range(1000)])
        w.add_tensor("one", np.ones((3, 5), np.float32))
        w.add_tensor("two", np.arange(7, dtype=np.float16))
        w.add_tensor("three", np.full((32,), 3.0, np.float32))

    file = open_weights(written(tmp_path / "a.gguf", fill))
    assert list(file.tensors) == ["one", "two", "three"]
    assert float(file.tensor("three").sum()) == 96
    assert torch.equal(file.tensor("two"), torch.arange(7).half())
    expected = {
        "general.architecture": "sd1", "general.name": "mine \n ü", "general.quantization_version": "2", "a.f": "0.5",
        "a.b": "true", "a.i": "-7", "a.few": "[1, 2, 3]", "a.texts": '["x", "y"]', "a.many": "1000 values",
        "a.words": "1000 texts",
    }  # fmt: skip
    assert file.metadata == expected


def test_tensors_that_were_reshaped_for_their_blocks(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).standard_normal((320, 4, 3, 3)).astype(np.float32)

    def fill(w: gguf.GGUFWriter) -> None:
        w.add_array("comfy.gguf.orig_shape.conv_in.weight", list(numbers.shape))
        data = gguf.quants.quantize(numbers.reshape(-1, 256), GGMLQuantizationType.Q8_0)
        w.add_tensor("conv_in.weight", data, raw_dtype=GGMLQuantizationType.Q8_0)

    file = open_weights(written(tmp_path / "a.gguf", fill))
    assert file.tensors["conv_in.weight"].shape == (320, 4, 3, 3)
    assert np.abs(file.tensor("conv_in.weight").numpy() - numbers).max() < 0.02


# By hand, so that every part can be wrong


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def info(
    name: bytes = b"a", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0, dims: int | None = None
) -> bytes:
    sizes = b"".join(struct.pack("<Q", n) for n in shape)
    return (
        text(name) + struct.pack("<I", len(shape) if dims is None else dims) + sizes + struct.pack("<IQ", kind, offset)
    )


def made(
    infos: bytes = info(), pairs: bytes = b"", data: bytes = bytes(32), version: int = 3, counts: Any = (1, 0)
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + pairs + infos
    return head + bytes(-len(head) % 32) + data


def refusal(content: bytes, path: Path) -> str:
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_weights(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_the_one_made_by_hand_is_sound(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(made())
    assert open_weights(tmp_path / "a.gguf").tensors["a"].shape == (8,)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (made(version=1), "of version 1; 2 and 3 are read"),
        (made(version=9), "of version 9"),
        (made(version=0x03000000), "big-endian"),
        (made(counts=(0, 0), infos=b"", data=b""), "holds no tensors"),
        (made(counts=(1 << 63, 0)), "claims"),
        (made(counts=(1, 1 << 63)), "claims"),
        (made(counts=(2, 0)), "begins at byte 0, expected 32"),
        (made(infos=info() + info(), counts=(2, 0)), "occurs twice"),
        (made(infos=info(name=b"\xff")), "not UTF-8"),
        (made(infos=info(name=b"a\nb")), "control characters"),
        (made(infos=info(dims=5)), "5 dimensions"),
        (made(infos=info(dims=1 << 31)), "dimensions"),
        (made(infos=info(shape=(1 << 63, 1 << 63))), "impossible shape"),
        (made(infos=info(shape=(1 << 40,))), "cut short"),
        (made(infos=info(kind=16)), "type IQ2_XXS, which is not read"),
        (made(infos=info(kind=4)), "type 4, which is not read"),
        (made(infos=info(kind=99)), "type 99"),
        (made(infos=info(kind=2)), "does not divide into Q4_0 blocks of 32"),
        (made(infos=info(kind=12, shape=(16, 16))), "does not divide into Q4_K blocks of 256"),
        (made(infos=info(offset=32), data=bytes(64)), "begins at byte 32, expected 0"),
        (made(infos=info(offset=1 << 63)), "begins at byte"),
        (made(infos=info() + info(b"b"), counts=(2, 0)), "begins at byte 0, expected 32"),
        (made(data=bytes(31)), "promises 32 bytes of data but 31 are there"),
        (made(data=bytes(65)), "bytes after its last tensor"),
        (made(pairs=pair(b"general.alignment", 4, struct.pack("<I", 7)), counts=(1, 1)), "alignment '7'"),
        (made(pairs=pair(b"general.alignment", 4, bytes(4)), counts=(1, 1)), "alignment '0'"),
        (made(pairs=pair(b"general.alignment", 8, text(b"x")), counts=(1, 1)), "alignment 'x'"),
        (made(pairs=pair(b"k", 13, b""), counts=(1, 1)), "unknown type 13"),
        (made(pairs=pair(b"k", 8, text(b"", 1 << 60)), counts=(1, 1)), "a text of"),
        (made(pairs=pair(b"k", 8, text(b"", 1 << 20)), counts=(1, 1)), "cut short"),
        (made(pairs=pair(b"k", 9, struct.pack("<IQ", 9, 1)), counts=(1, 1)), "a list of the type 9"),
        (made(pairs=pair(b"k", 9, struct.pack("<IQ", 4, 1 << 60)), counts=(1, 1)), "cut short"),
        (made(pairs=pair(b"k", 9, struct.pack("<IQ", 8, 1 << 60)), counts=(1, 1)), "texts"),
        (made(pairs=pair(b"k", 7, b"\1") * 2, counts=(1, 2)), "'k' occurs twice"),
        (made(pairs=pair(b"comfy.gguf.orig_shape.a", 8, text(b"[4]")), counts=(1, 1)), "cannot have been"),
        (made(pairs=pair(b"comfy.gguf.orig_shape.a", 8, text(b"?")), counts=(1, 1)), "original shape"),
        (made(pairs=pair(b"comfy.gguf.orig_shape.a", 8, text(b"[-8, -1]")), counts=(1, 1)), "original shape"),
    ],
)  # fmt: skip
def test_broken_files(content: bytes, said: str, tmp_path: Path) -> None:
    assert re.search(said, refusal(content, tmp_path / "a.gguf"))


def test_cut_anywhere(tmp_path: Path) -> None:
    content = made(pairs=pair(b"k", 8, text(b"value")), counts=(1, 1))
    for kept in range(1, len(content)):
        refusal(content[:kept], tmp_path / "a.gguf")


def test_version_2_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(made(version=2))
    assert open_weights(tmp_path / "a.gguf").tensors.keys() == {"a"}


SOUND = made(pairs=pair(b"key", 8, text(b"value")), counts=(1, 1))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    content = bytearray(SOUND)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(4, len(content) - 1))
        content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(content)


@given(damaged())
@settings(max_examples=200, deadline=2000)
def test_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    try:
        file: WeightFile = open_weights(path)
    except CheckpointError as error:
        assert str(error).isprintable()
    else:
        assert all(file.tensor(name).shape == info.shape for name, info in file.tensors.items())
