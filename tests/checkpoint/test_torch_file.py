"""Files of `torch.save`: everything that torch writes for tensors is read as torch reads it."""

import argparse
import collections
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.storage import _dtype_to_storage_type_map, _new_dtypes

from reverie.checkpoint.source import WeightFile, open_weights
from reverie.checkpoint.torch_file import DTYPES
from reverie.errors import CheckpointError
from tests.checkpoint.torch_bytes import directory64, number, program, several, storage, stream, table, tensor

FORMATS = [("zip", 2), ("zip", 3), ("zip", 4), ("zip", 5), ("stream", 1), ("stream", 2), ("stream", 4), ("stream", 5)]
QUIET = "ignore:ComplexHalf support is experimental:UserWarning"


def save(path: Path, value: object, form: str = "zip", protocol: int = 2) -> Path:
    path.unlink(missing_ok=True)  # tensors of an earlier file may be views of it
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    return path


def theirs(path: Path, protocol: int = 2) -> Any:
    """As torch reads it; its own restricted reader knows protocol 2 only."""
    return torch.load(path, weights_only=protocol == 2)


def bits(tensor: Tensor) -> bytes:
    """The numbers as bytes, row by row: also NaN, and types that torch cannot compare."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    flat = (
        torch.empty(0, dtype=torch.uint8) if plain.numel() == 0 else plain.clone(memory_format=torch.contiguous_format)
    )
    return bytes(flat.flatten().view(torch.uint8).numpy())


def same(ours: Tensor, expected: Tensor) -> bool:
    return (
        (ours.dtype, ours.shape, ours.stride()) == (expected.dtype, expected.shape, expected.stride())
        and ours.is_conj() == expected.is_conj()
        and ours.is_neg() == expected.is_neg()
        and bits(ours) == bits(expected)
    )


def some(dtype: torch.dtype, count: int) -> Tensor:
    """Random bits, NaN and infinity among them; a boolean is 0 or 1."""
    if dtype == torch.bool:
        return torch.rand(count) < 0.5
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype)


def every(file: WeightFile) -> dict[str, Tensor]:
    return {name: file.tensor(name) for name in file.tensors}


# All types, shapes, strides


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("form", ["zip", "stream"])
def test_every_type(dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    value = {"a": some(dtype, 6), "b": some(dtype, 6).reshape(2, 3).T, "c": some(dtype, 1)[0], "d": some(dtype, 0)}
    path = save(tmp_path / "a.pt", value, form)
    # The older format cannot be read by torch itself where the type is newer than it.
    file, expected = open_weights(path), value if form == "stream" and dtype in _new_dtypes() else theirs(path)
    assert file.format == {"zip": "torch", "stream": "torch-legacy"}[form]
    assert file.foreign == ()
    for name in value:
        assert same(file.tensor(name), expected[name]), name
        assert file.tensors[name].dtype == dtype
        assert file.tensors[name].shape == expected[name].shape


def test_every_type_that_torch_saves_is_known() -> None:
    saved = {str(dtype).removeprefix("torch.") for dtype in (*_dtype_to_storage_type_map(), *_new_dtypes())}
    assert {name for name in saved if not name.startswith("q")} == DTYPES.keys()


@st.composite
def views(draw: st.DrawFn) -> list[Tensor]:
    """Some windows on one storage: slices, transposes, repeats, single numbers, nothing."""
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8]))
    base = some(dtype, 24)
    result = []
    for _ in range(draw(st.integers(1, 3))):
        view = base.reshape(draw(st.sampled_from([(24,), (4, 6), (2, 3, 4), (1, 24)])))
        for _ in range(draw(st.integers(0, 3))):
            n = view.ndim
            change = draw(st.sampled_from(["slice", "transpose", "pick", "expand", "none"]))
            if change == "slice" and n:
                view = view[draw(st.integers(0, 2)) :: draw(st.integers(1, 3))]
            elif change == "transpose" and n > 1:
                view = view.transpose(0, n - 1)
            elif change == "pick" and n and len(view):
                view = view[draw(st.integers(0, len(view) - 1))]
            elif change == "expand":
                view = view.unsqueeze(0).expand(draw(st.integers(0, 3)), *view.shape)
        result.append(view)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torch")


@given(st.lists(views(), min_size=1, max_size=3), st.sampled_from(FORMATS))
@settings(max_examples=120, deadline=None)
def test_whatever_torch_writes_is_read_as_torch_reads_it(
    folder: Path, storages: list[list[Tensor]], form: tuple[str, int]
) -> None:
    value = {f"{i}.{j}": t for i, storage in enumerate(storages) for j, t in enumerate(storage)}
    path = save(folder / "any.ckpt", value, *form)
    ours, expected = every(open_weights(path)), theirs(path, form[1])
    assert list(ours) == list(expected)
    for name in value:
        assert same(ours[name], expected[name]), name
        for other in value:  # what shares memory there shares memory here, at the same distance
            if expected[name].numel() and expected[other].numel():
                there = _distance(expected[name], expected[other])
                here = _distance(ours[name], ours[other])
                assert (there is None) == (here is None)
                assert there == here


def _distance(a: Tensor, b: Tensor) -> int | None:
    """Bytes from one to the other where they are of one storage; the mapped file is one storage for all."""
    inside = range(a.untyped_storage().data_ptr(), a.untyped_storage().data_ptr() + a.untyped_storage().nbytes())
    return b.data_ptr() - a.data_ptr() if b.data_ptr() in inside else None


@pytest.mark.parametrize(("form", "protocol"), FORMATS)
def test_views_stay_views(form: str, protocol: int, tmp_path: Path) -> None:
    base = torch.arange(12.0)
    path = save(tmp_path / "a.pt", {"all": base, "part": base[3:7], "odd": base[1::2]}, form, protocol)
    tensors = every(open_weights(path))
    tensors["part"].fill_(-1)
    assert torch.equal(tensors["all"][3:7], torch.full((4,), -1.0))
    assert torch.equal(tensors["odd"], torch.tensor([1.0, -1, -1, 7, 9, 11]))
    assert torch.equal(theirs(path, protocol)["all"], base), "the file is not written to"


def test_conjugated_and_negated_views(tmp_path: Path) -> None:
    numbers = torch.randn(3, dtype=torch.complex64)
    value = {"conj": numbers.conj(), "neg": numbers.clone().conj().imag, "plain": numbers}
    assert value["conj"].is_conj()
    assert value["neg"].is_neg()
    for form in ("zip", "stream"):
        path = save(tmp_path / "a.pt", value, form)
        ours = open_weights(path)
        assert all(same(ours.tensor(name), t) for name, t in theirs(path).items())


@pytest.mark.filterwarnings(QUIET)
def test_parameters_and_tensors_with_attributes_are_their_tensors(tmp_path: Path) -> None:
    marked, parameter = torch.ones(2), nn.Parameter(torch.zeros(3))
    marked.note = "mine"  # type: ignore[attr-defined]
    parameter.note = "mine"  # type: ignore[attr-defined]
    value = {"marked": marked, "noted": parameter, "plain": nn.Parameter(torch.ones(1), requires_grad=False)}
    file = open_weights(save(tmp_path / "a.pt", value))
    assert all(torch.equal(file.tensor(name), t) for name, t in value.items())
    assert file.foreign == ()


def test_nothing_is_copied_from_an_archive(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"a": torch.arange(100.0), "b": torch.ones(7).half()})
    file = open_weights(path)
    start = torch.frombuffer(file._map, dtype=torch.uint8).data_ptr()
    for name in file.tensors:
        assert start <= file.tensor(name).data_ptr() < start + path.stat().st_size


def test_the_name_does_not_matter(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", {"a": torch.ones(2)})
    assert torch.equal(open_weights(path).tensor("a"), torch.ones(2))


def test_an_archive_of_more_than_4_gb(tmp_path: Path) -> None:
    """Sizes and offsets beyond 32 bits stand in fields of their own. The file has a hole and takes no space."""
    count = (5 << 30) // 4
    huge = tensor(shape=(count,), memory=storage(count=count))
    entries = [
        ("a/data.pkl", table(("a", huge), ("b", tensor(memory=storage("1")))), 0),
        ("a/version", b"3\n", 0),
        ("a/data/0", b"", 4 * count),
        ("a/data/1", np.arange(4, dtype=np.float32).tobytes(), 0),
    ]
    path, contents = tmp_path / "large.ckpt", b""
    with path.open("wb") as file:
        for title, content, hole in entries:
            size, offset, raw = len(content) + hole, file.tell(), title.encode()
            fields = struct.pack("<3H2H3L", 45, 0, 0, 0, 0, zlib.crc32(content), 0xFFFFFFFF, 0xFFFFFFFF)
            padding = -(offset + 30 + len(raw) + 24) % 64  # as torch aligns its storages
            file.write(b"PK\3\4" + fields + struct.pack("<2H", len(raw), 24 + padding) + raw)
            file.write(struct.pack("<2H2Q2H", 1, 16, size, size, 0x4246, padding) + bytes(padding) + content)
            file.seek(hole, os.SEEK_CUR)
            contents += b"PK\1\2" + struct.pack("<H", 45) + fields
            contents += struct.pack("<5H2L", len(raw), 28, 0, 0, 0, 0, 0xFFFFFFFF) + raw
            contents += struct.pack("<2H3Q", 1, 24, size, size, offset)
        start = file.tell()
        file.write(contents + directory64(len(entries), len(contents), start, start + len(contents)))
        file.write(b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 4, 4, len(contents), 0xFFFFFFFF, 0))
    ours, expected = open_weights(path), torch.load(path, mmap=True, weights_only=True)
    assert ours.tensors["a"].shape == expected["a"].shape == (count,)
    assert ours.tensor("a")[-1] == 0
    assert torch.equal(ours.tensor("b"), torch.arange(4.0))
    assert torch.equal(expected["b"], torch.arange(4.0))


# What real files put around their tensors


def test_a_checkpoint_of_lightning(tmp_path: Path) -> None:
    weights = {"model.a": torch.ones(2), "model.b": torch.zeros(1)}
    value = {
        "epoch": 6, "global_step": 470_000, "pytorch-lightning_version": "1.4.2", "state_dict": weights,
        "callbacks": {"best": np.float32(0.5), "args": argparse.Namespace(path="x")},
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.ones(5)}}}], "lr_schedulers": [],
        "hyper_parameters": collections.OrderedDict(lr=1e-4, betas=(0.9, 0.99)),
    }  # fmt: skip
    for form, protocol in FORMATS:
        file = open_weights(save(tmp_path / "a.ckpt", value, form, protocol))
        assert file.tensors.keys() == weights.keys()
        assert all(torch.equal(file.tensor(name), t) for name, t in weights.items())
        assert file.metadata == {
            "epoch": "6", "global_step": "470000", "pytorch-lightning_version": "1.4.2", "wrapper": "state_dict",
            "left_out": "callbacks, optimizer_states, lr_schedulers, hyper_parameters",
        }  # fmt: skip
        assert any("argparse.Namespace" in call for call in file.foreign)


@pytest.mark.parametrize(
    ("value", "names", "wrapper"),
    [
        ({"a": 1}, ["a"], None),
        ({"state_dict": {"a": 1}}, ["a"], "state_dict"),
        ({"state_dict": {"state_dict": {"a": 1}}}, ["a"], "state_dict.state_dict"),
        ({"params_ema": {"a": 1}, "params": {"a": 1, "b": 1}}, ["a"], "params_ema"),
        ({"params": {"a": 1}}, ["a"], "params"),
        ({"model": {"a": 1}, "optimizer": {"a": 1}}, ["a"], "model"),
        ({"module": {"a": 1}}, ["a"], "module"),
        ({"model": {"module": {"a": 1}}}, ["a"], "model.module"),
        ({"model": "resnet", "a": 1}, ["a"], None),
        ({"state_dict": {}, "a": 1}, ["a"], None),
        ({"image_proj": {"latents": 1}, "ip_adapter": {"1.k": 1}}, ["image_proj.latents", "ip_adapter.1.k"], None),
        ({768: ({"w": 1}, {"w": 1}), "layer_structure": [1, 2, 1]}, ["768.0.w", "768.1.w"], None),
        ([1, 1], ["0", "1"], None),
        (1, ["tensor"], None),
    ],
    ids=str,
)  # fmt: skip
def test_tables_are_unwrapped_and_joined(value: Any, names: list[str], wrapper: str | None, tmp_path: Path) -> None:
    file = open_weights(save(tmp_path / "a.pt", _filled(value)))
    assert list(file.tensors) == names
    assert file.metadata.get("wrapper") == wrapper


def _filled(value: Any) -> Any:
    """Tensors in the place of ones."""
    if isinstance(value, dict):
        return {key: inner if key == "layer_structure" else _filled(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_filled, value))
    return torch.ones(2) if value == 1 else value


def test_a_textual_inversion(tmp_path: Path) -> None:
    value = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}, "name": "cat", "step": 99,
             "sd_checkpoint": None, "sd_checkpoint_name": None}  # fmt: skip
    file = open_weights(save(tmp_path / "cat.pt", value))
    assert file.tensors["string_to_param.*"].shape == (2, 768)
    assert (file.metadata["name"], file.metadata["step"]) == ("cat", "99")


def test_texts_of_python_2_and_views_of_torch_0_3(tmp_path: Path) -> None:
    """Texts are bytes there, and a storage may be a window on another."""
    window = several(b"U\1v", number(4), number(4))
    view = several(b"U\7storage", b"ctorch\nFloatStorage\n", b"U\0010", b"U\3cpu", number(8), window) + b"Q"
    body = b"}U\1a" + tensor(memory=view) + b"sU\2\xc3\xa9" + tensor(memory=view, offset=1, shape=(2,)) + b"s"
    numbers = np.arange(8, dtype=np.float32).tobytes()
    (tmp_path / "a.pt").write_bytes(stream(program(body), ["0"], (8).to_bytes(8, "little") + numbers))
    file, expected = open_weights(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=False)
    assert list(file.tensors) == list(expected) == ["a", "é"]
    assert torch.equal(file.tensor("a"), torch.arange(4.0) + 4)
    assert all(same(file.tensor(key), t) for key, t in expected.items())


def test_a_pickled_module_gives_what_its_state_dict_would(tmp_path: Path) -> None:
    """The first textual inversions hold a ParameterDict; other files hold whole networks."""
    network = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3)))
    value = {"string_to_param": nn.ParameterDict({"*": nn.Parameter(torch.ones(1, 4))}), "net": network}
    file = open_weights(save(tmp_path / "a.pt", value))
    expected = {f"net.{name}": t for name, t in network.state_dict().items()}
    assert file.tensors.keys() == {"string_to_param.*", *expected}
    assert all(torch.equal(file.tensor(name), t) for name, t in expected.items())
    assert any("ParameterDict" in call for call in file.foreign)


def test_small_values_of_every_kind_are_kept(tmp_path: Path) -> None:
    value = {
        "a": torch.ones(1), "b": True, "n": None, "f": 0.5, "i": 1 << 70, "text": "ü\U0001f600", "bytes": b"\xffx",
        "c": 1 + 2j, "list": [1, "x"], "many": list(range(500)), "set": {"x"}, "size": torch.Size([2, 3]),
        "np": np.float64(2.5), "np_i": np.int16(-3), "np_b": np.bool_(True), "dtype": torch.float16,
        "device": torch.device("cpu"),
    }  # fmt: skip
    for form, protocol in FORMATS:
        file = open_weights(save(tmp_path / "a.pt", value, form, protocol))
        assert file.metadata == {
            "b": "true", "n": "null", "f": "0.5", "i": str(1 << 70), "text": "ü\U0001f600", "bytes": "\ufffdx",
            "c": "(1+2j)", "list": '[1, "x"]', "many": "500 values", "size": "[2, 3]", "np": "2.5",
            "np_i": "-3", "np_b": "true",
        }  # fmt: skip
        assert file.foreign == ()


# What is not read


def sparse() -> Tensor:
    return torch.eye(3).to_sparse()


def quantised() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: {"a": sparse()}, "a sparse tensor, which is not read"),
        (lambda: {"a": torch.eye(3).to_sparse_csr()}, "a sparse tensor, which is not read"),
        (lambda: {"a": quantised()}, "a quantised tensor of torch"),
        (lambda: {"a": torch.empty(2, device="meta")}, "a tensor on the meta device"),
        (lambda: {"a": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])}, "a nested tensor"),
        (lambda: {"a": 1}, "without tensors"),
        (lambda: {}, "without tensors"),
        (lambda: {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "two tensors 'a.b'"),
        (lambda: {"a\n": torch.ones(1)}, "control characters"),
    ],
)
def test_what_is_not_read_is_named(make: Callable[[], object], said: str, tmp_path: Path) -> None:
    for form in ("zip", "stream"):
        path = save(tmp_path / "a.pt", make(), form)
        with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
            open_weights(path)
        assert str(caught.value).isprintable()


def test_big_endian_files(tmp_path: Path) -> None:
    import zipfile

    path = save(tmp_path / "a.pt", {"a": torch.ones(1)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    with pytest.raises(CheckpointError, match="big-endian"):
        open_weights(tmp_path / "b.pt")
    content = save(tmp_path / "c.pt", {"a": torch.ones(1)}, "stream").read_bytes()
    assert content.count(b"little_endianq\x02\x88") == 1
    (tmp_path / "c.pt").unlink()
    (tmp_path / "c.pt").write_bytes(content.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    with pytest.raises(CheckpointError, match="big-endian"):
        open_weights(tmp_path / "c.pt")


def test_a_torchscript_program(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_weights(tmp_path / "a.pt")


def test_a_plain_pickle(tmp_path: Path) -> None:
    import pickle

    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"a": [1.0]}))
    with pytest.raises(CheckpointError, match="looks like a Python pickle that torch did not write"):
        open_weights(path)


@pytest.mark.parametrize("form", ["zip", "stream"])
def test_cut_anywhere(form: str, tmp_path: Path) -> None:
    target = io.BytesIO()
    torch.save({"a": torch.arange(5.0), "b": "x"}, target, _use_new_zipfile_serialization=form == "zip")
    content, path = target.getvalue(), tmp_path / "cut.pt"
    for kept in range(1, len(content)):
        path.unlink(missing_ok=True)
        path.write_bytes(content[:kept])
        with pytest.raises(CheckpointError) as caught:
            open_weights(path)
        assert str(caught.value).isprintable()
