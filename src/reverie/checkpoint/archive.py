"""Zip archives as torch writes them: where each entry lies in the file. Nothing is unpacked and nothing is copied.

Stricter than a program that unpacks: what torch never writes (compression, encryption, doubled or overlapping entries,
names that leave the folder) is refused. Structures: PKWARE APPNOTE 6.3.10, sections 4.3.7 to 4.3.16 and 4.5.3.
"""

import mmap
import struct
from collections.abc import Iterator
from typing import NamedTuple

from reverie.checkpoint.inert import FormatError
from reverie.checkpoint.weightfile import shown

MAX_ENTRIES = 100_000
MAX_COMMENT = 0xFFFF
END = struct.Struct("<4s4H2LH")  # end of central directory: disks, entries, size, offset, length of the comment
LOCATOR = struct.Struct("<4sLQL")  # of its 64-bit form
END64 = struct.Struct("<4sQ2H2L4Q")
CENTRAL = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")
NONE32, NONE16 = 0xFFFFFFFF, 0xFFFF  # "see the 64-bit form"
ENCRYPTED = 1
DAMAGED = "it is a zip archive (a PyTorch .ckpt or .pt file?) that is {}; download it again"


class Entry(NamedTuple):
    """The bytes of one entry, from `start` to `end` in the file. `header` is where the entry itself begins."""

    start: int
    end: int
    method: int
    header: int


def read_archive(data: mmap.mmap) -> dict[str, Entry]:
    """Every file in the archive by its name.

    Raises:
        FormatError: damaged, encrypted, or with entries that torch never writes.
    """
    first, last, count = _directory(data)
    entries: dict[str, Entry] = {}
    for name, entry in _entries(data, first, last, count):
        if name in entries:
            raise FormatError(f"it is a zip archive with two entries {shown(name)}")
        entries[name] = entry
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].header):
        if entry.header < position:
            raise FormatError(f"it is a zip archive whose entry {shown(name)} overlaps another")
        position = entry.end
    if position > first:
        raise FormatError(DAMAGED.format("damaged: an entry runs into its table of contents"))
    return {name: entry for name, entry in entries.items() if not name.endswith("/")}


def _directory(data: mmap.mmap) -> tuple[int, int, int]:
    """First and last byte of the table of contents, and its number of entries."""
    position = data.rfind(b"PK\5\6", max(0, len(data) - END.size - MAX_COMMENT))
    if position < 0 or position + END.size > len(data):
        raise FormatError(DAMAGED.format("cut short: it has no table of contents"))
    _, disk, start_disk, _, count, size, offset, comment = END.unpack_from(data, position)
    if position + END.size + comment != len(data) or disk or start_disk:
        raise FormatError(DAMAGED.format("damaged: its end is not where it says"))
    last = position
    if position >= LOCATOR.size and data[position - LOCATOR.size : position].startswith(b"PK\6\7"):
        last = LOCATOR.unpack_from(data, position - LOCATOR.size)[2]
        count, size, offset = _directory64(data, last, (count, size, offset))
    if count > MAX_ENTRIES:
        raise FormatError(f"it is a zip archive of {count:,} entries; at most {MAX_ENTRIES:,} are read")
    if offset + size > last or count * CENTRAL.size > size:
        raise FormatError(DAMAGED.format("damaged: its table of contents is not where it says"))
    return offset, offset + size, count


def _directory64(data: mmap.mmap, start: int, short: tuple[int, int, int]) -> tuple[int, int, int]:
    if start + END64.size > len(data) or data[start : start + 4] != b"PK\6\6":
        raise FormatError(DAMAGED.format("damaged: its 64-bit table of contents is not where it says"))
    *_, count, size, offset = END64.unpack_from(data, start)
    for wide, narrow, none in zip((count, size, offset), short, (NONE16, NONE32, NONE32), strict=True):
        if narrow not in (wide, none):
            raise FormatError(DAMAGED.format("damaged: its two tables of contents disagree"))
    return count, size, offset


def _entries(data: mmap.mmap, position: int, last: int, count: int) -> Iterator[tuple[str, Entry]]:
    for _ in range(count):
        if position + CENTRAL.size > last or data[position : position + 4] != b"PK\1\2":
            raise FormatError(DAMAGED.format("damaged: its table of contents is broken"))
        fields = CENTRAL.unpack_from(data, position)
        flags, method, packed, size, name_size, extra_size, comment_size = *fields[3:5], *fields[8:13]
        start = position + CENTRAL.size
        position = start + name_size + extra_size + comment_size
        if position > last:
            raise FormatError(DAMAGED.format("damaged: its table of contents is broken"))
        raw = data[start : start + name_size]
        extra = data[start + name_size : start + name_size + extra_size]
        size, packed, header = _wide(extra, (size, packed, fields[-1]))
        name = _name(raw)
        if flags & ENCRYPTED:
            raise FormatError(f"it is a zip archive whose entry {shown(name)} is encrypted")
        begin = _begin(data, header, raw)
        yield name, Entry(begin, begin + packed, method, header)


def _wide(extra: bytes, values: tuple[int, int, int]) -> tuple[int, int, int]:
    """Sizes and offset, where they are too large for 32 bits from the extra field 1."""
    wide = iter(())
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{min(size, len(extra) - 4) // 8}Q", extra, 4))
        extra = extra[4 + size :]
    try:
        first, second, third = (next(wide) if value == NONE32 else value for value in values)
    except (RuntimeError, ValueError):
        raise FormatError(DAMAGED.format("damaged: an entry has no 64-bit size")) from None
    return first, second, third


def _name(raw: bytes) -> str:
    name = raw.decode("utf-8", "replace")
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or ":" in parts[0] or ".." in parts or parts[0] == "":
        raise FormatError(f"it is a zip archive with the entry {shown(name)}, which would leave its folder")
    return name


def _begin(data: mmap.mmap, header: int, name: bytes) -> int:
    """Where an entry's bytes begin, from its own header, which repeats the name."""
    if header + LOCAL.size > len(data) or data[header : header + 4] != b"PK\3\4":
        raise FormatError(DAMAGED.format("cut short or damaged: an entry is not where it says"))
    fields: tuple[int, ...] = LOCAL.unpack_from(data, header)
    start, (name_size, extra_size) = header + LOCAL.size, fields[-2:]
    if data[start : start + name_size] != name:
        raise FormatError(DAMAGED.format("damaged: an entry has another name than its table of contents says"))
    return start + name_size + extra_size
