"""Writing tensor by tensor: the same numbers, little memory, and nothing half-written."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from reverie.checkpoint.save import Entry, write_entries
from reverie.checkpoint.source import DTYPES, WeightFile, open_sharded, open_weights
from reverie.checkpoint.stream import entries_of, write_sharded
from reverie.errors import OutputError


@pytest.fixture
def source(tmp_path: Path) -> WeightFile:
    torch.manual_seed(0)
    tensors = {
        "a.weight": torch.randn(4, 6), "a.bias": torch.randn(4).half(), "steps": torch.arange(3),
        "on": torch.ones(2).bool(), "none": torch.empty(0, 3), "one": torch.tensor(3.0),
    }  # fmt: skip
    torch.save({"state_dict": tensors}, tmp_path / "source.ckpt")
    return open_weights(tmp_path / "source.ckpt")


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def test_a_torch_file_becomes_safetensors(source: WeightFile, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_entries(path, entries_of([source]), {"title": "mine ü"})
    found = load_file(path)
    assert found.keys() == source.tensors.keys()
    assert all(same(found[name], source.tensor(name)) for name in found)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "title": "mine ü"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "source.ckpt"]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_type_is_written_aligned(dtype: torch.dtype, tmp_path: Path) -> None:
    byte = torch.ones(3, dtype=torch.uint8)
    numbers = torch.randint(0, 2, (2 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    given = {"byte": byte, "numbers": numbers, "turned": numbers.reshape(1, 2).T, "last": byte}
    write_entries(tmp_path / "a.safetensors", [_entry(name, t) for name, t in given.items()])
    file = open_weights(tmp_path / "a.safetensors")
    for name, t in given.items():
        assert torch.equal(file.tensor(name).flatten().view(torch.uint8), t.flatten().view(torch.uint8))
        assert (file.data + file.tensors[name].start) % dtype.itemsize == 0 or name in {"byte", "last"}


def _entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def test_other_types_and_names(source: WeightFile, tmp_path: Path) -> None:
    names = {"a.weight": "b.weight", "a.bias": "b.bias", "steps": None}
    entries = entries_of([source], dtype=torch.bfloat16, rename=lambda name: names.get(name, name))
    write_entries(tmp_path / "a.safetensors", entries)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == {"b.weight", "b.bias", "on", "none", "one"}
    assert same(found["b.weight"], source.tensor("a.weight").bfloat16())
    assert same(found["b.bias"], source.tensor("a.bias").bfloat16())
    assert found["on"].dtype == torch.bool


def test_a_type_for_each_tensor(source: WeightFile, tmp_path: Path) -> None:
    entries = entries_of([source], dtype=lambda name, info: torch.float16 if len(info.shape) > 1 else torch.float32)
    write_entries(tmp_path / "a.safetensors", entries)
    types = {name: t.dtype for name, t in load_file(tmp_path / "a.safetensors").items()}
    assert (types["a.weight"], types["a.bias"], types["steps"]) == (torch.float16, torch.float32, torch.int64)


def test_packed_weights_are_unpacked(tmp_path: Path) -> None:
    weight = torch.randn(3, 4).to(torch.float8_e4m3fn)
    save_file({"a.weight": weight, "a.scale_weight": torch.tensor(0.5)}, tmp_path / "scaled.safetensors")
    write_entries(tmp_path / "a.safetensors", entries_of([open_weights(tmp_path / "scaled.safetensors")]))
    assert same(load_file(tmp_path / "a.safetensors")["a.weight"], weight.float() * 0.5)


def test_progress_counts_bytes(source: WeightFile, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    entries = entries_of([source])
    total = sum(entry.nbytes for entry in entries)
    for limit in (10**9, 40):
        seen.clear()
        folder = tmp_path / str(limit)
        folder.mkdir()
        write_sharded(folder, "model", entries, limit=limit, progress=lambda done, of: seen.append((done, of)))
        assert len(seen) == len(entries)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1] == (total, total)
        assert {of for _, of in seen} == {total}


def test_shards_and_their_index(source: WeightFile, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    index = write_sharded(folder, "model", entries_of([source]), limit=30, metadata={"a": "b"})
    assert index == folder / "model.safetensors.index.json"
    files = open_sharded(index)
    assert len(files) == 3
    assert {name: float(file.tensor(name).sum()) for file in files for name in file.tensors} == {
        name: float(source.tensor(name).sum()) for name in source.tensors
    }
    table = json.loads(index.read_text(encoding="utf-8"))
    assert table["metadata"]["total_size"] == sum(entry.nbytes for entry in entries_of([source]))
    assert sorted(set(table["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all(file.metadata == {"format": "pt", "a": "b"} for file in files)


def test_one_shard_is_one_file(source: WeightFile, tmp_path: Path) -> None:
    assert write_sharded(tmp_path, "model", entries_of([source])) == tmp_path / "model.safetensors"
    assert load_file(tmp_path / "model.safetensors").keys() == source.tensors.keys()


# What goes wrong leaves nothing behind


def test_two_tensors_of_one_name(source: WeightFile, tmp_path: Path) -> None:
    entries = entries_of([source], rename=lambda _: "same")
    with pytest.raises(OutputError, match="two tensors would be named 'same'"):
        write_entries(tmp_path / "a.safetensors", entries)
    with pytest.raises(OutputError, match="two tensors would have one name"):
        write_sharded(tmp_path, "model", entries, limit=1)
    assert [p.name for p in tmp_path.iterdir()] == ["source.ckpt"]


def test_a_type_that_safetensors_has_not(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no type for 'a' of torch\.complex128"):
        write_entries(tmp_path / "a.safetensors", [_entry("a", torch.ones(1, dtype=torch.complex128))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sharded", [False, True])
def test_a_tensor_that_fails(source: WeightFile, sharded: bool, tmp_path: Path) -> None:
    def fail() -> Tensor:
        raise KeyboardInterrupt

    entries = [*entries_of([source]), Entry("last", torch.uint8, (1,), fail)]
    with pytest.raises(KeyboardInterrupt):
        write_sharded(tmp_path, "model", entries, limit=40 if sharded else 10**9)
    assert [p.name for p in tmp_path.iterdir()] == ["source.ckpt"]


def test_a_tensor_of_another_shape_than_announced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced"):
        write_entries(tmp_path / "a.safetensors", [Entry("a", torch.uint8, (2,), lambda: torch.ones(3).byte())])
    assert list(tmp_path.iterdir()) == []


def test_weights_that_would_be_taken_for_these(source: WeightFile, tmp_path: Path) -> None:
    write_sharded(tmp_path, "model", entries_of([source]))
    with pytest.raises(OutputError, match=r"already holds model\.safetensors"):
        write_sharded(tmp_path, "model", entries_of([source]), limit=40)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.safetensors.index.json")
    with pytest.raises(OutputError, match=r"already holds model\.safetensors\.index\.json"):
        write_sharded(tmp_path, "model", entries_of([source]))


def test_no_such_folder(source: WeightFile, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_sharded(tmp_path / "none", "model", entries_of([source]), limit=40)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' memory counter")
def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """24 tensors of 4 MiB become 2 MiB each; the allocator keeps some of those, never all."""

    def anonymous() -> int:
        found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
        assert found
        return int(found[1]) * 1024

    torch.save({str(i): torch.ones(1 << 20) for i in range(24)}, tmp_path / "a.ckpt")
    entries = entries_of([open_weights(tmp_path / "a.ckpt")], dtype=torch.float16)
    write_entries(tmp_path / "a.safetensors", entries[:1])  # what is imported and allocated once
    seen = [anonymous()]
    write_entries(tmp_path / "a.safetensors", entries, progress=lambda *_: seen.append(anonymous()))
    assert max(seen) - seen[0] < 20 << 20
    assert (tmp_path / "a.safetensors").stat().st_size > 24 * (2 << 20)
