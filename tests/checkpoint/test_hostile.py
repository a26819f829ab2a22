"""Every broken or hostile file is refused in one line, at once, in little memory, and nothing of it is executed."""

import json
import os
import pickle
import pickletools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.checkpoint.pickled import OPERATIONS, STOP, read_pickle
from reverie.checkpoint.source import open_sharded, open_weights
from reverie.errors import CheckpointError
from tests.checkpoint.files import entry, with_header
from tests.checkpoint.hostile import CALLS, HEAVY, HOSTILE, LIVE, SOUND, index
from tests.checkpoint.torch_bytes import Zipped, archive, call, name, program, stream, table, tensor, text

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes, links and commands of POSIX")

SECONDS = 3.0  # of the processor; on a quiet machine each takes less than one
MEMORY = 200_000_000  # bytes
LINE = 300  # characters, besides the path


class Outcome(NamedTuple):
    """What came of opening one file."""

    said: str
    seconds: float
    memory: int
    executed: list[str]
    left_a_trace: bool


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, Outcome]]:
    """All files opened, one after the other, in a process of their own."""
    with tempfile.TemporaryDirectory(prefix="hostile") as root:
        paths = {}
        for i, (title, build) in enumerate((HOSTILE | HEAVY).items()):
            folder = Path(root, str(i))
            folder.mkdir()
            paths[title] = build(folder, f"touch {root}/trace{i}")
        script = Path(__file__).with_name("open_all.py")
        given = json.dumps({title: str(path) for title, path in paths.items()})
        run = subprocess.run([sys.executable, script], input=given, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        yield {
            title: Outcome(said.replace(f"{root}/{i}", ""), seconds, memory, executed, Path(root, f"trace{i}").exists())
            for i, (title, (said, seconds, memory, executed)) in enumerate(json.loads(run.stdout).items())
        }


def test_there_are_many() -> None:
    assert len(HOSTILE | HEAVY) > 400


@pytest.mark.parametrize("title", HOSTILE | HEAVY)
def test_refused_in_one_line_at_once_and_unexecuted(outcomes: dict[str, Outcome], title: str) -> None:
    outcome = outcomes[title]
    assert not outcome.said.startswith(("READ", "CRASHED")), outcome.said
    assert outcome.said.isprintable()
    assert 0 < len(outcome.said) <= LINE
    assert outcome.executed == []
    assert not outcome.left_a_trace, "the command was executed"
    assert outcome.seconds < SECONDS
    assert outcome.memory < MEMORY


@pytest.mark.parametrize("title", LIVE | CALLS)
@pytest.mark.parametrize("form", ["zip", "stream", "bare"])
def test_hostile_calls_are_named(outcomes: dict[str, Outcome], title: str, form: str) -> None:
    said = outcomes[f"{form}: {title}"].said
    assert "it is hostile: its pickle calls" in said
    assert "nothing was executed" in said


def test_what_is_said_of_a_hostile_file(outcomes: dict[str, Outcome]) -> None:
    said = outcomes["zip: GLOBAL and REDUCE"].said
    assert "calls os.system('touch " in said
    assert "calls os.system by way of functools.partial" in outcomes["zip: partial"].said
    assert "a web page or XML; the download failed" in outcomes["a web page"].said
    assert "Git LFS pointer" in outcomes["a Git LFS pointer"].said
    assert "holds 'notes.txt', 'lora.safetensors'; unpack it" in outcomes["zip without data.pkl"].said


LIVE_SCRIPT = """
import json, pickle, sys
for program in json.load(sys.stdin):
    try:
        pickle.loads(bytes.fromhex(program))
    except Exception:
        pass
"""


def test_the_payloads_do_run_where_pickle_reads_them(tmp_path: Path) -> None:
    """So that what is refused is no straw man, and a trace would be seen."""
    made = [make(f"touch {tmp_path}/{i}").hex() for i, make in enumerate(LIVE.values())]
    command = [sys.executable, "-c", LIVE_SCRIPT]
    subprocess.run(command, input=json.dumps(made), text=True, check=True, capture_output=True)
    silent = [title for i, title in enumerate(LIVE) if not (tmp_path / str(i)).exists()]
    assert silent == []


# Hostile content that is only looked at


def test_the_one_made_by_hand_is_sound(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(SOUND)
    assert torch.equal(open_weights(tmp_path / "a.ckpt").tensor("a"), torch.zeros(4))
    assert torch.equal(torch.load(tmp_path / "a.ckpt", weights_only=True)["a"], torch.zeros(4))


def test_a_pickle_where_numbers_are_is_numbers(tmp_path: Path) -> None:
    """Nested archives and pickles in storages or in entries that nothing names are bytes like any others."""
    bomb = archive(LIVE["GLOBAL and REDUCE"](f"touch {tmp_path}/executed"))
    numbers = bomb + bytes(-len(bomb) % 4)
    content = archive(table(("a", tensor())), Zipped("archive/.data/evil.pkl", bomb), storage=numbers)
    (tmp_path / "a.ckpt").write_bytes(content)
    file = open_weights(tmp_path / "a.ckpt")
    assert bytes(file.tensor("a").view(torch.uint8).numpy()) == numbers[:16]
    assert not (tmp_path / "executed").exists()


def test_other_calls_are_reported_and_not_refused(tmp_path: Path) -> None:
    callback = call("pytorch_lightning.callbacks.ModelCheckpoint", text("x")) + b"}" + text("a") + b"K\1sb"
    (tmp_path / "a.ckpt").write_bytes(archive(table(("a", tensor()), ("b", callback))))
    file = open_weights(tmp_path / "a.ckpt")
    assert file.foreign == ("pytorch_lightning.callbacks.ModelCheckpoint('x')",)
    assert file.tensors.keys() == {"a"}


def test_a_name_that_is_not_called_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(archive(table(("a", tensor()), ("b", name("os.system")))))
    assert open_weights(tmp_path / "a.ckpt").tensors.keys() == {"a"}


def test_reports_stay_short(tmp_path: Path) -> None:
    calls = b"".join(call("a.b", text(str(i)), text("x" * 500)) + b"0" for i in range(1000))
    (tmp_path / "a.ckpt").write_bytes(archive(program(calls + b"}" + text("a") + tensor() + b"s")))
    foreign = open_weights(tmp_path / "a.ckpt").foreign
    assert len(foreign) == 100
    assert all(len(line) < 100 and line.isprintable() for line in foreign)


# Links


def test_links_inside_a_folder_and_inside_a_cache_of_the_hub(tmp_path: Path) -> None:
    content = with_header({"a": entry()})
    (tmp_path / "b.safetensors").write_bytes(content)
    (tmp_path / "a.safetensors").symlink_to("b.safetensors")
    assert [file.tensors.keys() for file in open_sharded(index(tmp_path, {"a": "a.safetensors"}))] == [{"a"}]
    model = tmp_path / "models--org--name"
    snapshot = model / "snapshots" / "0123" / "unet"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "ff").write_bytes(content)
    (snapshot / "a.safetensors").symlink_to("../../../blobs/ff")
    assert [file.tensors.keys() for file in open_sharded(index(snapshot, {"a": "a.safetensors"}))] == [{"a"}]
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    assert len(open_sharded(linked / "model.safetensors.index.json")) == 1


# Random damage


def refused_or_read(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    try:
        file = open_weights(path)
    except CheckpointError as error:
        assert str(error).isprintable()
        assert len(str(error)) < LINE + len(str(path))
    else:
        assert all(file.tensor(n).shape == info.shape for n, info in file.tensors.items())


SAMPLES = (SOUND, stream(table(("a", tensor())), ["0"], (4).to_bytes(8, "little") + bytes(16)))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A sound file with some bytes overwritten, removed or added."""
    content = bytearray(draw(st.sampled_from(SAMPLES)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content) - 1))
        content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(content)


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
PIECES = st.sampled_from(
    [
        *OPCODES,
        tensor(),
        text("a"),
        name("a.b"),
        name("collections.OrderedDict"),
        b"K\1",
        b"q\0",
        b"h\0",
        b"(",
        b"}",
        b"]",
    ]
)


@given(damaged())
@settings(max_examples=300, deadline=2000)
def test_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    refused_or_read(tmp_path_factory.getbasetemp() / "damaged.ckpt", content)


@given(st.lists(PIECES | st.binary(max_size=2), max_size=30))
@settings(max_examples=300, deadline=2000)
def test_any_pickle_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> None:
    refused_or_read(tmp_path_factory.getbasetemp() / "any.ckpt", archive(program(b"".join(pieces))))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(-5, 5), inner, max_size=4)
        | st.sets(st.text(max_size=3))
    ),
    max_leaves=12,
)


def test_every_opcode_is_known() -> None:
    assert OPERATIONS.keys() | {STOP} == {ord(opcode.code) for opcode in pickletools.opcodes}


@given(VALUES, st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_plain_values_are_read_as_pickle_reads_them(value: object, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    found = read_pickle(content + b"rest")
    assert found.value == value
    assert found.end == len(content)
    assert found.foreign == ()


def test_a_pipe_beside_an_index(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="is not a file"):
        open_sharded(index(tmp_path, {"a": "a.safetensors"}))
