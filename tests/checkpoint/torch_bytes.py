"""Zip archives and pickles written by hand, opcode by opcode, so that every part can be wrong."""

import pickle
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

MAGIC = 0x1950A86A20F9469CFC6C


@dataclass
class Zipped:
    """One entry; what is None is the truth."""

    name: str
    data: bytes = b""
    flags: int = 0
    method: int = 0
    size: int | None = None
    offset: int | None = None
    local_name: str | None = None
    extra: bytes = b""


def zipped(entries: Iterable[Zipped], count: int | None = None, start: int | None = None, tail: bytes = b"") -> bytes:
    """An archive; `tail` stands before the end of its table of contents."""
    body, table = bytearray(), bytearray()
    entries = list(entries)
    for e in entries:
        name, local = e.name.encode(), (e.local_name or e.name).encode()
        data = e.data if e.method == 0 else zlib.compress(e.data, 9)[2:-4]
        size = len(data) if e.size is None else e.size
        offset = len(body) if e.offset is None else e.offset
        fixed = struct.pack("<3H2H3L", 20, e.flags, e.method, 0, 0, zlib.crc32(e.data), size, len(e.data))
        body += b"PK\3\4" + fixed + struct.pack("<2H", len(local), 0) + local + data
        table += b"PK\1\2" + struct.pack("<H", 20) + fixed
        table += struct.pack("<5H2L", len(name), len(e.extra), 0, 0, 0, 0, offset) + name + e.extra
    n = len(entries) if count is None else count
    if n > 0xFFFF:
        tail = directory64(n, len(table), len(body), len(body) + len(table))
    end = struct.pack("<4H2LH", 0, 0, *[min(n, 0xFFFF)] * 2, len(table), len(body) if start is None else start, 0)
    return bytes(body + table) + tail + b"PK\5\6" + end


def directory64(count: int, size: int, offset: int, at: int) -> bytes:
    """The 64-bit form of the end of a table of contents, which is written at the byte `at`."""
    record = struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, count, count, size, offset)
    return b"PK\6\6" + record + b"PK\6\7" + struct.pack("<LQL", 0, at, 1)


def archive(content: bytes, *more: Zipped, storage: bytes | None = bytes(16)) -> bytes:
    """A torch file around a pickle."""
    entries = [Zipped("archive/data.pkl", content), Zipped("archive/version", b"3\n"), *more]
    return zipped(entries if storage is None else [*entries, Zipped("archive/data/0", storage)])


def stream(content: bytes, keys: list[str] | None = None, storages: bytes = b"") -> bytes:
    """A torch file of before 1.6 around a pickle."""
    heads = (MAGIC, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(head, 2) for head in heads) + content + pickle.dumps(keys or [], 2) + storages


# Opcodes


def program(body: bytes) -> bytes:
    """A pickle of protocol 2."""
    return b"\x80\x02" + body + b"."


def name(full: str) -> bytes:
    """Look up `module.name`."""
    module, _, last = full.rpartition(".")
    return b"c" + module.encode() + b"\n" + last.encode() + b"\n"


def text(value: str) -> bytes:
    """A text."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """An integer."""
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def several(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def call(function: str | bytes, *args: bytes) -> bytes:
    """A call of a name, or of what is on the stack."""
    return (name(function) if isinstance(function, str) else function) + several(*args) + b"R"


def table(*items: tuple[str, bytes]) -> bytes:
    """A pickle of a dictionary."""
    return program(b"}" + b"".join(text(key) + value + b"s" for key, value in items))


def storage(key: str = "0", count: int = 4, kind: str = "FloatStorage") -> bytes:
    """A storage, by its persistent id."""
    return several(text("storage"), name(f"torch.{kind}"), text(key), text("cpu"), number(count)) + b"Q"


def tensor(
    offset: int = 0, shape: Iterable[int] = (4,), stride: Iterable[int] = (1,), memory: bytes | None = None
) -> bytes:
    """A tensor as torch writes it."""
    sizes, strides = (several(*map(number, numbers)) for numbers in (shape, stride))
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", memory or storage(), number(offset), sizes, strides, b"\x89", hooks)
