"""Strict loading without a copy, and writing that leaves all or nothing."""

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from reverie.checkpoint.load import build
from reverie.checkpoint.save import write_atomically, write_json, write_weights
from reverie.checkpoint.source import open_weights
from reverie.errors import CheckpointError, OutputError


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = nn.Linear(2, 1, bias=False)


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: t.clone() for name, t in Net().state_dict().items()}


def refused(given: dict[str, Tensor]) -> str:
    with pytest.raises(CheckpointError) as caught:
        build(Net, given, "the net in a.safetensors")
    message = str(caught.value)
    assert message.startswith("the net in a.safetensors does not fit: ")
    assert "\n" not in message
    return message.removeprefix("the net in a.safetensors does not fit: ")


# Loading


def test_it_holds_what_it_was_given() -> None:
    given = tensors()
    net = build(Net, given, "the net")
    assert not net.training
    for name, p in net.named_parameters():
        assert torch.equal(p, given[name])
        assert p.data_ptr() == given[name].data_ptr()
        assert not p.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_parameters_are_views_of_the_mapped_file(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_weights(path, {name: t.to(dtype) for name, t in tensors().items()})
    file = open_weights(path)
    net = build(Net, {name: file.tensor(name) for name in file.tensors}, "the net")
    start = torch.frombuffer(file._map, dtype=torch.uint8).data_ptr()
    for p in net.parameters():
        assert p.dtype == dtype
        assert start + file.data <= p.data_ptr() < start + path.stat().st_size


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' memory counter")
def test_opening_takes_no_memory(tmp_path: Path) -> None:
    def anonymous() -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return sum(int(n) for n in re.findall(r"(?:RssAnon|RssFile):\s+(\d+)", status)) * 1024

    size = 1 << 26
    path = tmp_path / "a.safetensors"
    write_weights(path, {"weight": torch.zeros(1, size // 4)})
    before = anonymous()
    file = open_weights(path)
    layer = build(lambda: nn.Linear(size // 4, 1, bias=False), {"weight": file.tensor("weight")}, "the layer")
    assert anonymous() - before < size // 8
    assert float(layer.weight[0, -1]) == 0


def test_missing() -> None:
    given = tensors()
    del given["first.weight"]
    assert refused(given) == "1 tensor (first.weight) missing"


def test_unexpected() -> None:
    extra = {f"third.{name}": torch.zeros(1) for name in "abcd"}
    assert refused(tensors() | extra) == "4 tensors (third.a, third.b, third.c, ...) not expected"


def test_misspelt() -> None:
    given = tensors()
    given["first.wieght"] = given.pop("first.weight")
    said = refused(given)
    assert said == "1 tensor (first.weight) missing; found first.wieght instead?; 1 tensor (first.wieght) not expected"


def test_wrong_shape() -> None:
    said = refused(tensors() | {"first.weight": torch.zeros(2, 4)})
    assert said == "1 tensor (first.weight) wrongly shaped: [2, 4] found, [2, 3] expected"


def test_everything_at_once_is_one_message() -> None:
    said = refused({"first.weight": torch.zeros(3), "x": torch.zeros(1)})
    assert "2 tensors (first.bias, second.weight) missing" in said
    assert "1 tensor (x) not expected" in said
    assert "wrongly shaped: [3] found, [2, 3] expected" in said


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64], ids=str)
def test_weights_that_are_no_floating_point_numbers(dtype: torch.dtype) -> None:
    said = refused(tensors() | {"first.weight": torch.zeros(2, 3, dtype=dtype)})
    assert f"1 tensor (first.weight) of type {str(dtype).removeprefix('torch.')}" in said
    assert "quantised" in said


@pytest.mark.parametrize("sizes", [("3", 2), (3, None), (-3, 2), (3.5, 2)], ids=str)
def test_a_config_that_describes_no_network(sizes: tuple[int, int]) -> None:
    with pytest.raises(CheckpointError, match=r"^the net has a config that describes no network: .") as caught:
        build(lambda: nn.Linear(*sizes), {}, "the net")
    assert "\n" not in str(caught.value)


# Writing


def left(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_written_under_its_name(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def write(path: Path) -> None:
        path.write_text("new", encoding="utf-8")
        seen.append(left(tmp_path))

    (tmp_path / "a.txt").write_text("old", encoding="utf-8")
    write_atomically(tmp_path / "a.txt", write)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "new"
    assert left(tmp_path) == {"a.txt"}
    assert len(seen[0] - {"a.txt"}) == 1, "the old file is not touched before the new one is complete"


class Full:
    """Writes a little and fails with `error`."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, path: Path) -> None:
        path.write_bytes(b"half")
        raise self.error


@pytest.mark.parametrize("before", [None, "old"])
def test_a_full_disk_leaves_nothing_new(before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    if before:
        path.write_text(before, encoding="utf-8")
    with pytest.raises(OutputError, match=r"cannot write .*a\.png: No space left on device"):
        write_atomically(path, Full(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert left(tmp_path) == ({"a.png"} if before else set())
    assert before is None or path.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), MemoryError()], ids=repr)
def test_other_failures_pass_through_and_leave_nothing(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        write_atomically(tmp_path / "a.png", Full(error))
    assert left(tmp_path) == set()


def test_an_error_without_a_reason_still_says_something(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="encoder broken"):
        write_atomically(tmp_path / "a.png", Full(OSError("encoder broken")))


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        write_json(tmp_path / "none" / "a.json", {})
    with pytest.raises(OutputError):
        write_weights(tmp_path / "none" / "a.safetensors", tensors())


def test_the_target_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_json(tmp_path / "a.json", {})
    assert left(tmp_path) == {"a.json"}


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            write_json(tmp_path / "a.json", {})
    finally:
        tmp_path.chmod(0o700)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    write_weights(small_disk / "small.safetensors", tensors())
    with pytest.raises(OutputError, match="cannot write"):
        write_weights(small_disk / "a.safetensors", {"a": torch.zeros(1 << 20)})
    with pytest.raises(OutputError, match=r"cannot write .*: No space left on device"):
        write_json(small_disk / "a.json", {"a": "x" * (1 << 20)})
    assert left(small_disk) == {"small.safetensors"}


def test_weights_are_those_that_were_given(tmp_path: Path) -> None:
    given = {"turned": torch.arange(6.0).reshape(2, 3).T, "part": torch.arange(9.0)[::2], "half": torch.ones(2).half()}
    write_weights(tmp_path / "a.safetensors", given)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in given.items())


def test_json_ends_in_a_line(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [1]}
    assert text.endswith("}\n")
