"""Broken and hostile files, made byte by byte, each by its name.

A builder gets an empty folder and a command that leaves a trace when it is executed, and returns the path to open.
"""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

from tests.checkpoint.files import entry, raw, with_header
from tests.checkpoint.hostile_pickles import CALLS, LIVE, SYSTEM
from tests.checkpoint.torch_bytes import (
    MAGIC,
    Zipped,
    archive,
    call,
    directory64,
    name,
    number,
    program,
    several,
    storage,
    stream,
    table,
    tensor,
    text,
    zipped,
)

__all__ = ["CALLS", "HEAVY", "HOSTILE", "LIVE", "SOUND", "index"]

Builder = Callable[[Path, str], Path]
HOSTILE: dict[str, Builder] = {}
HEAVY: dict[str, Builder] = {}  # what would take minutes or gigabytes elsewhere, and some need most of a second here


def hostile(title: str) -> Callable[[Builder], Builder]:
    """Register a builder."""

    def register(build: Builder) -> Builder:
        assert title not in HOSTILE, title
        HOSTILE[title] = build
        return build

    return register


def content(title: str, data: bytes | Callable[[str], bytes], into: dict[str, Builder] = HOSTILE) -> None:
    """Register a file by its bytes."""
    assert title not in into, title

    def build(folder: Path, command: str) -> Path:
        path = folder / "model.safetensors"
        path.write_bytes(data(command) if callable(data) else data)
        return path

    into[title] = build


# Safetensors

ONE = {"a": entry()}
SAFE = with_header({"a": entry(), "b": entry("F16", [4], 8, 16)}, bytes(16))

for _kept in (1, 7, 8, 9, 40, len(SAFE) - 16, len(SAFE) - 1):
    content(f"safetensors cut at {_kept}", SAFE[:_kept])
for _name, _header in {
    "overlapping tensors": {"a": entry(), "b": entry(start=4, end=12)},
    "the same bytes twice": {"a": entry(), "b": entry()},
    "a gap between tensors": {"a": entry(), "b": entry(start=12, end=20)},
    "offsets beyond the file": {"a": entry(start=1 << 40, end=(1 << 40) + 8)},
    "offsets of 64 bits": {"a": entry(start=1 << 63, end=(1 << 63) + 8)},
    "offsets backwards": {"a": entry(start=8, end=0)},
    "a negative offset": {"a": entry(start=-8, end=0)},
    "offsets as text": {"a": entry(start="0")},
    "offsets as fractions": {"a": entry(start=0.0, end=8.0)},
    "infinite offsets": {"a": entry(end=float("inf"))},
    "an offset that is no number": {"a": entry(end=float("nan"))},
    "a negative dimension": {"a": entry(shape=[-2])},
    "two negative dimensions": {"a": entry(shape=[-1, -2])},
    "a dimension as text": {"a": entry(shape=["2"])},
    "a boolean dimension": {"a": entry(shape=[True, 2])},
    "a product that overflows to the right size": {"a": entry(shape=[(1 << 63) + 1, 2])},
    "a product that overflows to nothing": {"a": entry(shape=[1 << 32, 1 << 32], end=0)},
    "zero times everything": {"a": entry(shape=[0, 1 << 62, 1 << 62], end=0)},
    "a thousand dimensions": {"a": entry(shape=[1] * 1000 + [2])},
    "bytes of another type": {"a": entry("F64")},
    "an unknown type": {"a": entry("F7")},
    "a type that is no text": {"a": entry() | {"dtype": []}},
    "a type that is a million characters": {"a": entry("F" * 1_000_000)},
    "a name of a million characters": {"a" * 1_000_000: entry(shape=[3])},
    "a name that paints the terminal": {"\x1b[31mred\n": entry()},
    "metadata that is a list": {"__metadata__": ["a"], "a": entry()},
    "metadata that is a number": {"__metadata__": 3, "a": entry()},
    "an entry that is a number": {"a": 3},
    "no tensors": {},
    "only metadata": {"__metadata__": {"a": "b"}},
}.items():
    content(_name, with_header(_header))
for _name, _length in {
    "2 GB": 2 << 30,
    "100 MB": 100_000_000,
    "2**63": 1 << 63,
    "2**64 - 1": (1 << 64) - 1,
    "0": 0,
}.items():
    content(f"a header length of {_name}", raw(b'{"a":1}', b"", _length))
for _name, _text in {
    "a name twice": b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2),
    "a key twice in an entry": b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}',
    "lists in lists": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "tables in tables": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "lists that do not end": b'{"a":' + b"[" * 1_000_000,
    "a number of a million digits": b'{"a":' + b"9" * 1_000_000 + b"}",
    "text that is not UTF-8": b'{"a\xff":1}',
    "half a header": b'{"a":{"dtype":"F32",',
    "two headers": b'{"a":1}{"a":1}',
    "a comment": b'{/* */"a":1}',
    "UTF-16": '{"a": 1}'.encode("utf-16-le"),
}.items():
    content(f"JSON: {_name}", raw(_text, bytes(8)))
for _name, _heavy in {
    "JSON: millions of empty lists": lambda _: raw(b'{"a":[' + b"[]," * 4_000_000 + b"[]]}"),
    "JSON: millions of empty tables": lambda _: raw(b'{"a":[' + b"{}," * 4_000_000 + b"{}]}"),
    "JSON: a hundred thousand broken entries": lambda _: raw(json.dumps(dict.fromkeys(range(100_000), 1)).encode()),
}.items():
    content(_name, _heavy, HEAVY)


# Torch files

DATA_PKL = table(("a", tensor()))
SOUND = archive(DATA_PKL)
PICKLE = Zipped("archive/data.pkl", DATA_PKL)


def lying(**lies: object) -> Zipped:
    """The entry of the pickle with something wrong."""
    return Zipped("archive/data.pkl", DATA_PKL, **lies)  # type: ignore[arg-type]


for _kept in (3, 30, 60, len(SOUND) // 2, len(SOUND) - 22, len(SOUND) - 1):
    content(f"zip cut at {_kept}", SOUND[:_kept])
for _name, _data in {
    "with bytes after its end": SOUND + b"PK",
    "empty": zipped([]),
    "without data.pkl": zipped([Zipped("notes.txt", b"x"), Zipped("lora.safetensors", SAFE)]),
    "of Keras": zipped([Zipped("config.json", b"{}"), Zipped("model.weights.h5", b"\x89HDF\r\n\x1a\n")]),
    "with two data.pkl": zipped([Zipped("a/data.pkl", DATA_PKL), Zipped("b/data.pkl", DATA_PKL)]),
    "with data.pkl twice": zipped([PICKLE, PICKLE]),
    "with data.pkl at its top": zipped([Zipped("data.pkl", DATA_PKL)]),
    "with an absolute name": archive(DATA_PKL, Zipped("/etc/passwd", b"x")),
    "with a name of Windows": archive(DATA_PKL, Zipped("C:\\x", b"x")),
    "that climbs": archive(DATA_PKL, Zipped("archive/../../x", b"x")),
    "with a name that paints the terminal": archive(DATA_PKL, Zipped("archive/\x1b[31m\n", b"x")),
    "with an encrypted pickle": zipped([lying(flags=1)]),
    "with a compressed pickle": zipped([lying(method=8)]),
    "bomb": zipped([Zipped("archive/data.pkl", b"\x80\x02" + b"]" * 5_000_000, method=8)]),
    "bomb as a storage": zipped([PICKLE, Zipped("archive/data/0", bytes(5_000_000), method=8)]),
    "with entries that share a header": zipped([PICKLE, Zipped("archive/data/0", bytes(16), offset=0)]),
    "with entries that overlap": zipped([lying(size=len(DATA_PKL) + 9), Zipped("archive/data/0", bytes(16))]),
    "with an entry of another name": zipped([lying(local_name="archive/data.pk1")]),
    "with an entry beyond its end": zipped([lying(offset=1 << 30)]),
    "with an entry larger than itself": zipped([lying(size=1 << 30)]),
    "with more entries than it has": zipped([PICKLE], count=9),
    "with 65534 entries in 60 bytes": zipped([PICKLE], count=0xFFFE),
    "with its table beyond its end": zipped([PICKLE], start=1 << 30),
    "with sizes that are in no 64-bit field": zipped([lying(size=0xFFFFFFFF)]),
    "with a size of 2**63": zipped([lying(size=0xFFFFFFFF, extra=struct.pack("<2HQ", 1, 8, 1 << 63))]),
    "with two tables that disagree": zipped([PICKLE], tail=directory64(7, 99, 0, len(DATA_PKL) + 46 + 62)),
    "with a 64-bit table that is nowhere": zipped([PICKLE], tail=directory64(1, 62, 0, 1 << 60)[-20:]),
    "without the storage": archive(DATA_PKL, storage=None),
    "with half of the storage": archive(DATA_PKL, storage=bytes(8)),
    "of big-endian numbers": archive(DATA_PKL, Zipped("archive/byteorder", b"big")),
    "of a TorchScript program": archive(DATA_PKL, Zipped("archive/constants.pkl", DATA_PKL)),
    "with a zip for a pickle": archive(SOUND),
    "with an empty pickle": archive(b""),
}.items():
    content(f"zip {_name}", _data)
content("zip of 100,001 entries", zipped([PICKLE], count=100_001))

# Tensors that lie

REBUILD = "torch._utils._rebuild_"
FOUR, ONCE = several(number(4)), several(number(1))
for _name, _body in {
    "a window beyond its storage": tensor(offset=1),
    "a stride beyond its storage": tensor(stride=(2,)),
    "a negative offset": tensor(offset=-1),
    "a negative stride": tensor(stride=(-1,)),
    "a negative dimension": tensor(shape=(-4,)),
    "dimensions that overflow": tensor(shape=(1 << 62, 1 << 62), stride=(0, 0)),
    "numbers repeated to 64 TB": tensor(shape=(1 << 22, 1 << 22), stride=(0, 0)),
    "another number of strides": tensor(stride=(1, 1)),
    "a thousand dimensions": tensor(shape=[1] * 1000, stride=[1] * 1000),
    "a storage that climbs": tensor(memory=storage("../../../../etc/passwd")),
    "a storage of 2**62 numbers": tensor(memory=storage(count=1 << 62)),
    "a storage of -1 numbers": tensor(memory=storage(count=-1)),
    "a storage that is a text": tensor(memory=text("0")),
    "a storage of another class": tensor(memory=storage(kind="Tensor")),
    "a storage of quantised numbers": tensor(memory=storage(kind="QInt8Storage")),
    "a storage without a type": tensor(memory=storage(kind="UntypedStorage")),
    "a shape that is a text": call(f"{REBUILD}tensor", storage(), number(0), text("4"), text("1")),
    "an unknown type": call(
        f"{REBUILD}tensor_v3", storage(), number(0), FOUR, ONCE, b"\x89", b"N", name("torch.float7")
    ),
    "a type that is no type": call(f"{REBUILD}tensor_v3", storage(), number(0), FOUR, ONCE, b"\x89", b"N", text("x")),
    "too few arguments": call(f"{REBUILD}tensor_v2"),
    "a tensor made of itself": call("torch._tensor._rebuild_from_type_v2", b"h\0", b"N", b"N", b"N"),
    "a parameter of nothing": call(f"{REBUILD}parameter", b"N", b"N", b"N"),
    "a sparse tensor": call(f"{REBUILD}sparse_tensor", b"N", b"N"),
    "a quantised tensor": call(f"{REBUILD}qtensor", b"N", b"N"),
    "a state for a tensor": tensor() + several(storage(), number(0), FOUR, ONCE) + b"b",
}.items():
    _pickle = program(name("torch._tensor._rebuild_from_type_v2") + b"q\0}" + text("a") + _body + b"s")
    content(f"torch: {_name}", archive(_pickle))
    content(f"torch stream: {_name}", stream(_pickle, ["0"], struct.pack("<q", 4) + bytes(16)))
for _name, _keys, _storages in (
    ("a storage that is cut", ["0"], struct.pack("<q", 4) + bytes(15)),
    ("a storage of 2**62 numbers", ["0"], struct.pack("<q", 1 << 62)),
    ("a storage of -1 numbers", ["0"], struct.pack("<q", -1)),
    ("a storage without a size", ["0"], b""),
    ("no storages", [], b""),
    ("a storage that nothing names", ["1"], struct.pack("<q", 4) + bytes(16)),
):
    content(f"stream: {_name}", stream(DATA_PKL, _keys, _storages))
content("stream: keys that are no list", stream(DATA_PKL).removesuffix(pickle.dumps([], 2)) + pickle.dumps(3, 2))
content("stream: of another version", pickle.dumps(MAGIC, 2) + pickle.dumps(7, 2) + pickle.dumps({}, 2))
content("stream: cut after its head", stream(DATA_PKL)[:60])

# Pickles that break the machine

for _name, _program in {
    "an opcode that is none": program(b"\xff"),
    "nothing on the stack": program(b""),
    "a call of nothing": program(b"R"),
    "a tuple of nothing": program(b"\x87"),
    "a mark that is not there": program(b"t"),
    "a memo that is not there": program(b"h\5"),
    "a memo at -1": program(b"Np-1\n"),
    "a value below the mark": program(b"N(\x85"),
    "an append to nothing": program(b"N]a"),
    "an append to a number": program(b"K\1K\2a"),
    "an item in a list": program(b"]K\1K\2s"),
    "half an item": program(b"}(K\1u"),
    "a member of a list": program(b"](K\1\x90"),
    "a text of 2**63 bytes": program(b"\x8d" + struct.pack("<Q", 1 << 63) + b"x"),
    "bytes of 2**63": program(b"\x8e" + struct.pack("<Q", 1 << 63) + b"x"),
    "an array of 2**63": program(b"\x96" + struct.pack("<Q", 1 << 63) + b"x"),
    "a text of 4 GB": program(b"X\xff\xff\xff\xffx"),
    "an integer of 2 GB": program(b"\x8b\xff\xff\xff\x7f\1"),
    "a line without an end": program(b"c" + b"a" * 100_000),
    "an integer that is none": program(b"Iabc\n"),
    "a float that is none": program(b"Fabc\n"),
    "a text without quotes": program(b"Sabc\n"),
    "a name that is no text": program(b"K\1K\2\x93"),
    "arguments that are no tuple": program(name("collections.OrderedDict") + b"]R"),
    "a state for a number": program(b"K\1}b"),
    "a dictionary of a number": program(call("collections.Counter", b"]K\1a")),
    "bytes of a number": program(call("builtins.bytearray", b"M\xff\xff")),
    "an integer of a million digits": program(call("builtins.int", text("9" * 1_000_000))),
    "a buffer from outside": program(b"\x97"),
    "a key outside that is a text": program(b"Pabc\n"),
    "a key outside that is a number": program(b"K\1Q"),
    "a key outside that is a name": program(SYSTEM + b"Q"),
    "an extension of 1 byte": program(b"\x82\1"),
    "an extension of 2 bytes": program(b"\x83\1\1"),
    "an extension of 4 bytes": program(b"\x84\1\1\1\1"),
    "a table that holds itself": program(b"}q\0" + text("a") + b"h\0s"),
    "a list that holds itself": program(b"]q\0h\0a"),
    "no tensors": table(("a", b"K\1")),
    "no stop": b"\x80\x02}",
}.items():
    content(f"pickle: {_name}", archive(_program))


def collide(count: int) -> bytes:
    """A table whose keys all have the hash 0."""
    keys = (b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") for i in range(count))
    return program(b"}(" + b"".join(key + b"N" for key in keys) + b"u")


def doubled(times: int) -> bytes:
    """A list of two lists of two lists, the same ones: 2**times values."""
    return program(b"]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(times)))


for _name, _heavy in {
    "millions of sets": lambda _: b"\x80\x04" + b"\x8f" * 3_000_000,
    "millions of lists": lambda _: b"\x80\x02" + b"]" * 3_000_000,
    "millions of marks": lambda _: b"\x80\x02" + b"(" * 3_000_000,
    "millions of names": lambda _: b"\x80\x02" + b"".join(b"c%x\n%x\n" % (i, i) for i in range(200_000)),
    "millions of calls": lambda _: b"\x80\x02ca\nb\nq\0" + b"h\0)R" * 700_000,
    "copies of a long list": lambda _: program(
        b"]q\1(" + b"K\1" * 99_999 + b"e" + name("builtins.set") + b"q\0" + b"h\0h\1\x85R0" * 99_999
    ),
    "keys that collide": lambda _: collide(100_000),
    "a key nested half a million times": lambda _: program(b"}q\0N" + b"\x85" * 500_000 + b"q\1h\0h\1Ns"),
    "doubled forty times": lambda _: doubled(40),
    "doubled twenty times": lambda _: doubled(20),
    "30 MB of text": lambda _: program((b"X\0\0\x10\0" + "\U0001f600".encode() + b"a" * ((1 << 20) - 4)) * 30),
}.items():
    content(f"pickle: {_name}", lambda c, make=_heavy: archive(make(c)), HEAVY)  # type: ignore[misc]

# Pickles that execute a command

for _name, _make in (LIVE | CALLS).items():
    content(f"zip: {_name}", lambda command, make=_make: archive(make(command)))  # type: ignore[misc]
    content(f"stream: {_name}", lambda command, make=_make: stream(make(command)))  # type: ignore[misc]
    content(f"bare: {_name}", _make)


# GGUF


def gguf(
    infos: bytes = b"", pairs: bytes = b"", data: bytes = bytes(32), version: int = 3, counts: tuple[int, int] = (1, 0)
) -> bytes:
    """A GGUF file."""
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + pairs + infos
    return head + bytes(-len(head) % 32) + data


def described(
    name: bytes = b"a", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0, dims: int | None = None
) -> bytes:
    """One tensor of a GGUF header."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape) if dims is None else dims, *shape)
    return struct.pack("<Q", len(name)) + name + sizes + struct.pack("<IQ", kind, offset)


def pair(kind: int, value: bytes, key: bytes = b"k") -> bytes:
    """One entry of GGUF metadata."""
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


for _name, _data in {
    "with 2**63 tensors": gguf(counts=(1 << 63, 0)),
    "with 2**63 entries": gguf(counts=(1, 1 << 63)),
    "with 100,000 tensors in 60 bytes": gguf(described(), counts=(100_000, 0)),
    "with 5 dimensions": gguf(described(dims=5)),
    "with 2**32 - 1 dimensions": gguf(described(dims=(1 << 32) - 1)),
    "with dimensions that overflow": gguf(described(shape=(1 << 33, 1 << 33))),
    "with a dimension of 2**64 - 1": gguf(described(shape=((1 << 64) - 1,))),
    "with a name of 2**60 bytes": gguf(struct.pack("<Q", 1 << 60) + b"a"),
    "with a name that paints the terminal": gguf(described(b"\x1b[31m")),
    "with a name twice": gguf(described() + described(offset=32), counts=(2, 0), data=bytes(64)),
    "of an unknown type": gguf(described(kind=77)),
    "of a type that is not read": gguf(described(kind=19)),
    "with rows that are no blocks": gguf(described(kind=8)),
    "with an offset beyond its end": gguf(described(offset=1 << 40)),
    "with an offset that is not aligned": gguf(described(offset=4)),
    "with tensors that overlap": gguf(described() + described(b"b"), counts=(2, 0)),
    "with half of its data": gguf(described(), data=bytes(16)),
    "with a text of 2**62 bytes": gguf(described(), pair(8, struct.pack("<Q", 1 << 62)), counts=(1, 1)),
    "with a list of 2**62 numbers": gguf(described(), pair(9, struct.pack("<IQ", 4, 1 << 62)), counts=(1, 1)),
    "with a list of 2**62 texts": gguf(described(), pair(9, struct.pack("<IQ", 8, 1 << 62)), counts=(1, 1)),
    "with lists in lists": gguf(described(), pair(9, struct.pack("<IQ", 9, 1) * 1000), counts=(1, 1)),
    "with an alignment of 0": gguf(described(), pair(4, bytes(4), b"general.alignment"), counts=(1, 1)),
    "with an alignment of 2**31": gguf(
        described(), pair(4, struct.pack("<I", 1 << 31), b"general.alignment"), counts=(1, 1)
    ),
    "of version 0": gguf(described(), version=0),
    "of version 99": gguf(described(), version=99),
    "of big-endian numbers": gguf(described(), version=3 << 24),
    "cut in its head": gguf(described())[:20],
    "cut in a tensor": gguf(described())[:40],
}.items():
    content(f"GGUF {_name}", _data)
content(
    "GGUF with a million texts",
    gguf(described(), pair(9, struct.pack("<IQ", 8, 1_000_001) + bytes(8_000_008)), counts=(1, 1)),
    HEAVY,
)

# Files that are something else

for _name, _data in {
    "an empty file": b"",
    "a web page": b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>",
    "a web page in capitals": b"<HTML><BODY>404</BODY></HTML>" + b" " * 100,
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4265380512\n",
    "an error of a server": b'{"error":"Access to model is restricted"}',
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "a JPEG": b"\xff\xd8\xff\xe0" + bytes(100),
    "Keras weights": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "an ONNX model": b"\x08\x08\x12\x07pytorch\x1a\x051.9.0" + bytes(100),
    "a TensorFlow Lite model": b"\x1c\0\0\0TFL3" + bytes(100),
    "a tar archive": b"sys_info".ljust(257, b"\0") + b"ustar\0" + b"00" + bytes(300),
    "a gzip archive": b"\x1f\x8b\x08" + bytes(100),
    "a 7z archive": b"7z\xbc\xaf\x27\x1c" + bytes(100),
    "zeros": bytes(1000),
    "words": b"these are the weights, honestly\n" * 10,
    "a plain pickle": pickle.dumps({"a": 1}),
}.items():
    content(_name, _data)


# Files that are no files, and shards


@hostile("a header of 90 MB")
def _(folder: Path, _command: str) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(raw(b'{"a":', b"", 90_000_000))
    os.truncate(path, 90_000_008)
    return path


@hostile("a folder")
def _(folder: Path, _command: str) -> Path:
    (folder / "model.safetensors").mkdir()
    return folder / "model.safetensors"


@hostile("a pipe")
def _(folder: Path, _command: str) -> Path:
    os.mkfifo(folder / "model.safetensors")
    return folder / "model.safetensors"


@hostile("a device")
def _(folder: Path, _command: str) -> Path:
    (folder / "model.safetensors").symlink_to("/dev/zero")
    return folder / "model.safetensors"


@hostile("a link to itself")
def _(folder: Path, _command: str) -> Path:
    (folder / "model.safetensors").symlink_to(folder / "model.safetensors")
    return folder / "model.safetensors"


@hostile("nothing")
def _(folder: Path, _command: str) -> Path:
    return folder / "model.safetensors"


def index(folder: Path, weight_map: object) -> Path:
    """A folder of shards."""
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return path


for _name, _shard in {
    "above": "../secret.safetensors", "absolute": "/etc/passwd", "below": "sub/a.safetensors", "the folder": ".",
    "nothing": "", "of Windows": "..\\secret.safetensors", "missing": "gone.safetensors", "with a zero": "a\0b",
    "of 5000 characters": "x" * 5000, "that paints": "\x1b[31m",
}.items():  # fmt: skip
    HOSTILE[f"shards: a file {_name}"] = lambda folder, _, shard=_shard: index(folder, {"a": shard})  # type: ignore[misc]


@hostile("shards: a link out of the folder")
def _(folder: Path, _command: str) -> Path:
    (folder / "secret.safetensors").write_bytes(with_header(ONE))
    (folder / "model").mkdir()
    (folder / "model" / "a.safetensors").symlink_to(folder / "secret.safetensors")
    return index(folder / "model", {"a": "a.safetensors"})


@hostile("shards: a link out of the cache")
def _(folder: Path, _command: str) -> Path:
    snapshot = folder / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (folder / "secret").write_bytes(with_header(ONE))
    (snapshot / "a.safetensors").symlink_to("../../../secret")
    return index(snapshot, {"a": "a.safetensors"})


@hostile("shards: an index that is a folder")
def _(folder: Path, _command: str) -> Path:
    (folder / "model.safetensors.index.json").mkdir()
    return folder / "model.safetensors.index.json"


@hostile("shards: an index that is a pipe")
def _(folder: Path, _command: str) -> Path:
    os.mkfifo(folder / "model.safetensors.index.json")
    return folder / "model.safetensors.index.json"


@hostile("shards: an index of lists in lists")
def _(folder: Path, _command: str) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_bytes(b'{"weight_map":' + b"[" * 100_000)
    return path


@hostile("shards: a name that is nowhere")
def _(folder: Path, _command: str) -> Path:
    (folder / "a.safetensors").write_bytes(with_header(ONE))
    return index(folder, {"b" * 100_000: "a.safetensors"})
