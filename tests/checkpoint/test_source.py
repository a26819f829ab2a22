"""Reading safetensors: equal to the reference library on what is sound, one clear line on everything else."""

import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from reverie.checkpoint.source import DTYPES, open_sharded, open_weights
from reverie.errors import CheckpointError
from tests.checkpoint.files import ENTRY, entry, raw, with_header, write


def refusal(open_it: Callable[[], object]) -> str:
    """The one line with which something is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_it()
    message = str(caught.value)
    assert message.isprintable(), message
    return message


def refused(content: bytes, folder: Path) -> str:
    path = write(folder / "model.safetensors", content)
    message = refusal(lambda: open_weights(path))
    assert "model.safetensors" in message
    assert len(message) < 1000
    return message


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit: also NaN, and types that torch cannot compare."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def some(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Random bits, NaN and infinity among them; a boolean is 0 or 1."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    count = int(torch.tensor(shape).prod()) if shape else 1
    bits = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


# Sound files


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (5,), (2, 3, 4), (1, 1, 1, 1, 1)], ids=str)
def test_tensors_are_those_of_the_reference_library(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": some(dtype, shape), "b": some(dtype, (3,))}, path, {"format": "pt"})
    ours, theirs = open_weights(path), load_file(path)
    assert ours.metadata == {"format": "pt"}
    assert ours.tensors.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert same(ours.tensor(name), expected)
        assert ours.tensors[name].shape == expected.shape
        assert ours.tensors[name].count == expected.numel()


def test_every_type_of_the_reference_library_is_known() -> None:
    from safetensors.torch import _TYPES

    assert DTYPES.items() >= _TYPES.items()


SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
NAMES = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12)
FILES = st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES.values())), SHAPES), min_size=1, max_size=6)


@given(FILES)
def test_whatever_the_reference_library_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    written = {name: some(dtype, shape) for name, (dtype, shape) in tensors.items() if name != "__metadata__"}
    path.unlink(missing_ok=True)  # tensors of the last example are views of it
    path.write_bytes(save(written or {"a": torch.ones(1)}))
    file = open_weights(path)
    assert all(same(file.tensor(name), t) for name, t in written.items())


@pytest.mark.parametrize("before", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_misaligned_numbers_are_read(before: int, dtype: torch.dtype, tmp_path: Path) -> None:
    numbers = some(dtype, (7,))
    data = numbers.view(torch.uint8).numpy().tobytes()
    kind = next(name for name, known in DTYPES.items() if known == dtype)
    header = {"x": entry("U8", [before], 0, before), "y": entry(kind, [7], before, before + len(data))}
    path = write(tmp_path / "odd.safetensors", with_header(header, b"\1" * before + data))
    assert same(open_weights(path).tensor("y"), numbers)
    assert same(load_file(path)["y"], numbers)


@pytest.mark.parametrize("padding", [b"", b"   ", b"\n\t "])
def test_padding_after_the_header_is_fine(padding: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", raw(json.dumps({"a": ENTRY}).encode() + padding, b"\0" * 8))
    assert torch.equal(open_weights(path).tensor("a"), torch.zeros(2))


def test_tensors_are_in_the_order_of_the_header(tmp_path: Path) -> None:
    header = {"b": entry(shape=[1], start=4), "a": entry(shape=[1], end=4)}
    path = write(tmp_path / "a.safetensors", with_header(header))
    assert list(open_weights(path).tensors) == ["b", "a"]


@pytest.mark.parametrize("before", [0, 1])
def test_writing_into_a_tensor_does_not_change_the_file(before: int, tmp_path: Path) -> None:
    header = {"x": entry("U8", [before], 0, before), "a": entry(start=before, end=before + 8)}
    content = with_header(header, b"\1" * (before + 8))
    path = write(tmp_path / "a.safetensors", content)
    file = open_weights(path)
    file.tensor("a").fill_(3)
    assert path.read_bytes() == content
    assert not torch.equal(open_weights(path).tensor("a"), torch.full((2,), 3.0))


def test_tensors_outlive_the_file_object_and_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", with_header({"a": ENTRY}, b"\0\0\x80\x3f" * 2))
    tensor = open_weights(path).tensor("a")
    path.unlink()
    assert torch.equal(tensor, torch.ones(2))


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    """A sparse file of a terabyte opens as quickly as a small one."""
    size = 1 << 40
    path = tmp_path / "large.safetensors"
    header = json.dumps({"a": entry("U8", [size], 0, size)}).encode()
    path.write_bytes(raw(header))
    try:
        os.truncate(path, 8 + len(header) + size)
    except OSError:
        pytest.skip("this file system has no files of a terabyte")
    try:
        file = open_weights(path)
    except CheckpointError as error:
        assert "cannot map" in str(error)
        pytest.skip("this machine does not map a terabyte")
    assert file.tensor("a")[-1] == 0


# Files that are not there, or not files


def test_no_such_file(tmp_path: Path) -> None:
    assert refusal(lambda: open_weights(tmp_path / "none")) == f"no such file: {tmp_path / 'none'}"


def test_a_name_that_cannot_be() -> None:
    assert "File name too long" in refusal(lambda: open_weights(Path("x" * 5000)))
    assert "no such file" in refusal(lambda: open_weights(Path("a.safetensors/b")))


@pytest.mark.parametrize("linked", [False, True])
def test_a_folder(linked: bool, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    if linked:
        (tmp_path / "link").symlink_to(path)
    assert "is not a file" in refusal(lambda: open_weights(tmp_path / "link" if linked else path))


@pytest.mark.parametrize("target", ["loop", "gone"])
def test_a_link_to_nothing(target: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / target)
    refusal(lambda: open_weights(tmp_path / "loop"))


def test_a_link_to_a_file_is_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", with_header({"a": ENTRY}))
    (tmp_path / "link").symlink_to(tmp_path / "a.safetensors")
    assert open_weights(tmp_path / "link").tensors.keys() == {"a"}


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in the file system")
@pytest.mark.timeout(20)
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refusal(lambda: open_weights(tmp_path / "pipe"))
    assert "is not a file" in refusal(lambda: open_weights(Path("/dev/zero")))


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", with_header({"a": ENTRY}))
    path.chmod(0)
    assert "Permission denied" in refusal(lambda: open_weights(path))


# Files that are something else


def zipped() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("notes.txt", b"x")
    return target.getvalue()


def png() -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (4, 4)).save(target, "PNG")
    return target.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty (0 bytes)"),
        (b"\x08\0\0", "is not a safetensors file"),
        (b"prompt: a red apple\n", "looks like text, beginning 'prompt: a red apple"),
        (b"hi", "looks like text, beginning 'hi'"),
        (png(), "looks like a PNG picture"),
        (zipped(), "holds 'notes.txt'; unpack it"),
        (pickle.dumps({"a": 1}, protocol=2), "looks like a Python pickle"),
        (pickle.dumps({"a": 1}, protocol=4), "looks like a Python pickle"),
        (b"GGUF\3\0\0\0" + b"\0" * 40, "holds no tensors"),
        (b"<!DOCTYPE html><html><title>404</title>", "looks like a web page"),
        (LFS, "looks like a Git LFS pointer"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 40, "looks like a JPEG picture"),
        (b"\x93NUMPY\1\0v\0" + b"\0" * 40, "beginning with bytes 93 4e 55 4d 50 59 01 00"),
        (b"\0" * 64, "beginning with bytes 00 00"),
    ],
)
def test_other_files_are_called_what_they_are(content: bytes, said: str, tmp_path: Path) -> None:
    assert said in refused(content, tmp_path)


# Files that are cut short or damaged

SOUND = with_header({"a": ENTRY, "b": entry("F16", [4], 8, 16)}, bytes(range(16)))


@pytest.mark.parametrize("kept", range(1, len(SOUND)))
def test_cut_anywhere(kept: int, tmp_path: Path) -> None:
    message = refused(SOUND[:kept], tmp_path)
    if kept > 8:
        assert "cut short" in message
        assert "download it again" in message


def test_where_it_is_cut_is_said(tmp_path: Path) -> None:
    assert "cut short inside its header (20 of at least" in refused(SOUND[:20], tmp_path)
    said = refused(SOUND[:-4], tmp_path)
    assert "promises 16 bytes of data" in said
    assert "12 are there" in said


def test_bytes_after_the_end(tmp_path: Path) -> None:
    assert "3 bytes after its last tensor" in refused(SOUND + b"abc", tmp_path)


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 1 << 62, (1 << 64) - 1])
def test_header_lengths_that_cannot_be(length: int, tmp_path: Path) -> None:
    assert "is not a safetensors file" in refused(raw(b'{"a": 1}', b"", length), tmp_path)


def test_a_large_header_that_is_not_there(tmp_path: Path) -> None:
    said = refused(raw(b'{"a": 1}', b"", 99_999_999), tmp_path)
    assert "cut short inside its header (16 of at least 100,000,007 bytes)" in said


def test_a_header_longer_than_it_says_or_shorter(tmp_path: Path) -> None:
    header = json.dumps({"a": ENTRY}).encode()
    for wrong in (-1, 1):
        refused(raw(header, b"\0" * 8, len(header) + wrong), tmp_path)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{nothing}", "is broken"),
        (b'{"a": }', "is broken"),
        (b'{"a": 1} x', "is broken"),
        (b"[]", "is not a safetensors file"),
        (b'"text"', "is not a safetensors file"),
        (b' {"a": 1}', "is not a safetensors file"),
        (b"{}", "holds no tensors"),
        (b'{"__metadata__": {}}', "holds no tensors"),
        (b'{"__metadata__": 3}', "metadata that is not a JSON object"),
        (b'{"__metadata__": ["a"]}', "metadata that is not a JSON object"),
        (b'{"a": "\xff\xfe"}', "is broken: 'utf-8' codec can't decode byte 0xff"),
        (b'{"a": "\0"}', "is broken"),
        ('{"a": 1}'.encode("utf-16-le"), "is broken"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "'dtype' occurs twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is broken"),
        (b'{"a": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_001, "is broken"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is broken"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else None,
)
def test_broken_headers(header: bytes, said: str, tmp_path: Path) -> None:
    assert said in refused(raw(header), tmp_path)


@pytest.mark.timeout(60)
def test_a_hostile_header_takes_no_quadratic_time(tmp_path: Path) -> None:
    many = b",".join(b'"%d":1' % i for i in range(200_000))
    assert "'1' occurs twice" in refused(raw(b"{" + many + b',"1":1}'), tmp_path)
    shape = b",".join([b"9"] * 300_000)
    assert "properly" in refused(raw(b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,8]}}' % shape), tmp_path)


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in ENTRY.items() if name != key}


@pytest.mark.parametrize(
    "wrong",
    [
        3, "F32", None, [], [ENTRY], {}, without("dtype"), without("shape"), without("data_offsets"),
        entry(shape=[-2]), entry(shape=[-1, -2]), entry(shape=[True, 2]), entry(shape=[2.0]), entry(shape=["2"]),
        entry(shape=2), entry(shape=None), entry(shape=[[2]]), entry(shape=[1] * 65 + [2]),
        entry(start=8, end=0), entry(start=-8, end=0), entry(start=0.0), entry(start="0"), entry(end=None),
        entry("U8", [1], False, True), ENTRY | {"data_offsets": [0, 8, 16]}, ENTRY | {"data_offsets": []},
        ENTRY | {"data_offsets": "08"}, ENTRY | {"dtype": 32}, ENTRY | {"dtype": None},
    ],
    ids=str,
)  # fmt: skip
def test_entries_that_describe_no_tensor(wrong: object, tmp_path: Path) -> None:
    assert "does not describe tensor 'a' properly" in refused(with_header({"a": wrong}), tmp_path)


@pytest.mark.parametrize("dtype", ["F31", "", "f32", "torch.float32", "F4", "\n"])
def test_unknown_types(dtype: str, tmp_path: Path) -> None:
    assert f"tensor 'a' has the unknown type {dtype!r}" in refused(with_header({"a": entry(dtype)}), tmp_path)


@pytest.mark.parametrize("wrong", [entry(shape=[3]), entry(shape=[]), entry("F16"), entry(shape=[2, 0])], ids=str)
def test_shape_and_bytes_disagree(wrong: object, tmp_path: Path) -> None:
    assert "but 8 bytes of data" in refused(with_header({"a": wrong}), tmp_path)


@pytest.mark.parametrize("shape", [[1 << 63, 0], [0, 1 << 40, 1 << 40], [1 << 62, 0], [0, 10**400]], ids=str)
def test_sizes_that_overflow(shape: list[int], tmp_path: Path) -> None:
    assert "impossible shape" in refused(with_header({"a": entry(shape=shape, end=0)}, b""), tmp_path)


@pytest.mark.parametrize("shape", [[1 << 32, 1 << 32], [1 << 62, 4], [(1 << 63) + 1, 2]])
def test_sizes_do_not_wrap_around(shape: list[int], tmp_path: Path) -> None:
    refused(with_header({"a": entry("U8", shape, 0, 0)}, b""), tmp_path)
    refused(with_header({"a": entry(shape=shape)}), tmp_path)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"a": ENTRY, "b": ENTRY}, "begins at byte 0, expected 8"),
        ({"a": ENTRY, "b": entry(start=4, end=12)}, "begins at byte 4, expected 8"),
        ({"a": ENTRY, "b": entry(start=12, end=20)}, "begins at byte 12, expected 8"),
        ({"a": entry(start=4, end=12)}, "begins at byte 4, expected 0"),
        ({"a": ENTRY, "b": entry(shape=[0], start=3, end=3)}, "expected"),
        ({"a": ENTRY, "b": entry(shape=[0], start=99, end=99)}, "begins at byte 99"),
        ({"a": entry(start=1 << 40, end=(1 << 40) + 8)}, "begins at byte"),
        ({"a": ENTRY, "b": entry(start=8, end=16), "c": entry(start=16, end=24)}, "promises 24 bytes of data"),
    ],
)
def test_data_is_covered_exactly(entries: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refused(with_header(entries, b"\0" * 20), tmp_path)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mred", "\0", "\x7f", "\ud800", "a\rb", "\u2028", "\u202egnp.exe"])
def test_names_that_would_spoil_a_message(name: str, tmp_path: Path) -> None:
    assert "control characters" in refused(with_header({name: ENTRY}), tmp_path)


@pytest.mark.parametrize("key", ["a\nb", "\x1b[31m"])
def test_metadata_may_hold_anything(key: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", with_header({"__metadata__": {key: key, "n": 1}, "a": ENTRY}))
    assert open_weights(path).metadata == {key: key, "n": "1"}


# Random damage


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A sound file with some bytes overwritten, removed or added."""
    content = bytearray(SOUND)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content) - 1))
        piece = draw(st.binary(max_size=3) | st.sampled_from([b"9", b"-1", b"[", b"}", b"1e9", b'"', b"null", b"{"]))
        content[at : at + draw(st.integers(0, 3))] = piece
    return bytes(content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F8_E4M3"]) | JSON,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 16), min_size=2, max_size=2) | JSON,
    }
)
HEADERS = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES | JSON, max_size=3)


def opens_or_refuses(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    try:
        file = open_weights(path)
    except CheckpointError as error:
        assert str(error).isprintable()
    else:
        for name, info in file.tensors.items():
            assert file.tensor(name).shape == info.shape


@given(damaged())
@settings(max_examples=300, deadline=2000)
def test_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    opens_or_refuses(tmp_path_factory.getbasetemp() / "damaged.safetensors", content)


@given(HEADERS, st.binary(max_size=16))
@settings(max_examples=300, deadline=2000)
def test_any_header_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes) -> None:
    opens_or_refuses(tmp_path_factory.getbasetemp() / "header.safetensors", with_header(header, data))


@given(st.binary(max_size=200))
@settings(deadline=2000)
def test_any_bytes_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    opens_or_refuses(tmp_path_factory.getbasetemp() / "bytes.safetensors", content)


# Shards


def shards(folder: Path, weight_map: object) -> Path:
    save_file({"a": torch.zeros(1), "b": torch.ones(1)}, folder / "1.safetensors")
    save_file({"c": torch.full((1,), 2.0)}, folder / "2.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 12}, "weight_map": weight_map}), encoding="utf-8")
    return path


def test_shards_are_opened_together(tmp_path: Path) -> None:
    path = shards(tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    files = open_sharded(path)
    assert {n: float(f.tensor(n)) for f in files for n in f.tensors} == {"a": 0, "b": 1, "c": 2}


def test_shards_may_be_torch_files(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "1.bin")
    save_file({"b": torch.zeros(1)}, tmp_path / "2.bin")
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "1.bin", "b": "2.bin"}}), encoding="utf-8")
    assert [file.tensors.keys() for file in open_sharded(path)] == [{"a"}, {"b"}]


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "3.safetensors"}, "no such file"),
        ({"a": "../1.safetensors"}, "must be files of the same folder"),
        ({"a": "/etc/passwd"}, "must be files of the same folder"),
        ({"a": "sub/1.safetensors"}, "must be files of the same folder"),
        ({"a": "."}, "must be files of the same folder"),
        ({"a": ".."}, "is not a file"),
        ({"a": ""}, "is not a file"),
        ({"a": None}, "no such file"),
        ({"a": "2.safetensors"}, "says that 'a' is in 2.safetensors, which does not have it"),
        ({"a\nb": "2.safetensors"}, r"says that 'a\nb' is in"),
        ({"a": "x\ny"}, "names 'x\\ny'"),
        ([["a", "1.safetensors"]], "no table `weight_map`"),
        (None, "no table `weight_map`"),
        ("a", "no table `weight_map`"),
    ],
)
def test_broken_indexes(weight_map: object, said: str, tmp_path: Path) -> None:
    assert said in refusal(lambda: open_sharded(shards(tmp_path, weight_map)))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"{}", b"\xff\xfe", b'{"weight_map": ' + b"[" * 100_000], ids=repr
)
def test_an_index_that_is_none(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors.index.json", content)
    assert "is not an index of shards" in refusal(lambda: open_sharded(path))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    path = shards(tmp_path, {"a": "1.safetensors", "c": "2.safetensors"})
    save_file({"c": torch.zeros(1), "a": torch.ones(1)}, tmp_path / "2.safetensors")
    assert "tensor 'a' is in 2 of the files" in refusal(lambda: open_sharded(path))
