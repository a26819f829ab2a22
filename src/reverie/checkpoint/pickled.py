"""Pickles, read without executing them.

A pickle is a program for a small stack machine, which can look up any name of any module and call it. This is another
implementation of that machine (opcodes and their arguments: `pickletools` of the standard library) in which looking up
gives a `Global`, only a name, and calling gives an `Unknown`, only a record of what would have been called. A handful
of names that stand for tensors, containers and numbers mean what they say (`reverie.checkpoint.known`). Nothing is
imported, and nothing from the file is called.

Every opcode costs a step of a fixed budget, and what copies or allocates costs more, so that no file takes long or
much memory. The stack and the memo are bounded by the same budget: every entry was a step.
"""

import codecs
import mmap
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from reverie.checkpoint import known
from reverie.checkpoint.inert import (
    FormatError,
    Global,
    NumberType,
    Storage,
    Unknown,
    brief,
    globals_in,
    hashable,
    look_up,
)

BUDGET = 700_000  # steps, some 50 a tensor: SDXL with its averaged weights and optimiser takes 470,000
TEXT = 32  # bytes of a text that cost a step
HEAVY = 4  # steps for what takes a few hundred bytes
NAME = 8  # steps for a new name
CALL = 16  # steps for a call that is recorded
MAX_LINE = 1_000  # bytes of a name or number in the text opcodes
MAX_INTEGER = 1_024  # bytes
MAX_FOREIGN = 100  # calls that are recorded
TOO_LONG = "its pickle takes more steps than any checkpoint needs"
CUT = "its pickle is cut short; download it again"


class Pickle(NamedTuple):
    """What one pickle describes.

    Attributes:
        value: containers, numbers, texts, and the classes of `reverie.checkpoint.inert`.
        end: the byte after it.
        foreign: the calls that were not made.
        storages: by key, as they were first named.
    """

    value: Any
    end: int
    foreign: tuple[str, ...]
    storages: dict[str, Storage]


def read_pickle(data: mmap.mmap | bytes, start: int = 0, end: int | None = None) -> Pickle:
    """Interpret one pickle.

    Raises:
        FormatError: broken, too large, or calling what only hostile files call.
    """
    machine = Machine(data, start, len(data) if end is None else end)
    try:
        value = machine.run()
    except (IndexError, KeyError):
        raise FormatError(f"its pickle is broken at byte {machine.position:,}: it takes what is not there") from None
    except (ValueError, TypeError, ArithmeticError, struct.error, AttributeError) as error:
        raise FormatError(f"its pickle is broken at byte {machine.position:,}: {brief(str(error))}") from None
    return Pickle(value, machine.position, tuple(machine.foreign), machine.storages)


class Machine:
    """The stack machine."""

    def __init__(self, data: mmap.mmap | bytes, start: int, end: int) -> None:
        self.data, self.position, self.end = data, start, end
        self.stack: list[Any] = []
        self.push = self.stack.append
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[tuple[str, str], Global] = {}
        self.foreign: dict[str, None] = {}
        self.storages: dict[str, Storage] = {}
        self.budget = BUDGET

    def run(self) -> Any:
        """Until STOP."""
        data, end, operations = self.data, self.end, OPERATIONS
        while self.position < end:
            code = data[self.position]
            self.position += 1
            self.budget -= 1
            if self.budget < 0:
                raise FormatError(TOO_LONG)
            if code == STOP:
                return self.stack.pop()
            operation = operations.get(code)
            if operation is None:
                raise FormatError(f"its pickle is broken at byte {self.position:,}: no opcode 0x{code:02x}")
            operation(self)
        raise FormatError(CUT)

    def spend(self, steps: int) -> None:
        """Pay for work or memory."""
        self.budget -= steps
        if self.budget < 0:
            raise FormatError(TOO_LONG)

    # Arguments

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.end - self.position:
            raise FormatError(CUT)
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, size: int) -> int:
        """The next bytes as an unsigned number."""
        return int.from_bytes(self.take(size), "little")

    def text(self, size: int) -> bytes:
        """The content of a text whose length comes first."""
        length = self.number(size)
        self.spend(min(length, self.end - self.position) // TEXT)
        return self.take(length)

    def line(self) -> bytes:
        """The bytes up to the next line break."""
        stop = self.data.find(b"\n", self.position, min(self.end, self.position + MAX_LINE))
        if stop < 0:
            raise FormatError(
                CUT if self.end - self.position < MAX_LINE else "its pickle is broken: a line without an end"
            )
        line = self.data[self.position : stop]
        self.position = stop + 1
        return line

    def name(self) -> Global:
        """The name that two lines hold."""
        return self.look_up(self.line().decode("utf-8"), self.line().decode("utf-8"))

    # The stack

    def pop_mark(self) -> list[Any]:
        """What was pushed since the last MARK."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def pop(self) -> Any:
        """The value on top, none of those before the last MARK."""
        if self.marks and self.marks[-1] >= len(self.stack):
            raise IndexError
        return self.stack.pop()

    def remember(self, index: int) -> None:
        """Give the value on top a number."""
        if not 0 <= index < 1 << 32:
            raise IndexError
        self.memo[index] = self.stack[-1]

    def fill(self, items: Sequence[Any]) -> None:
        """Keys and values, alternating, into the table on top."""
        target = self.stack[-1]
        if isinstance(target, Unknown) and target.table is None:
            target.table = {}
        table = target.table if isinstance(target, Unknown) else target
        if not isinstance(table, dict) or len(items) % 2:
            raise FormatError("its pickle is broken: it fills something that is no table")
        for i in range(0, len(items), 2):
            table[hashable(items[i])] = items[i + 1]

    def extend(self, items: Sequence[Any]) -> None:
        """Values onto the list on top. Those of an unknown class of list are dropped."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Unknown):
            raise FormatError("its pickle is broken: it fills something that is no list")

    # Calls

    def look_up(self, module: str, name: str) -> Global:
        """A name, not its meaning."""
        found = self.names.get((module, name))
        if found is None:
            if len(module) + len(name) > MAX_LINE:
                raise FormatError("its pickle is broken: a name without an end")
            self.spend(NAME)
            found = self.names[module, name] = look_up(module, name)
        return found

    def call(self, function: Any, args: Any) -> Any:
        """What a call would have made: the meaning of a known name, or a record.

        Raises:
            FormatError: only hostile files make this call.
        """
        if not isinstance(args, tuple):
            raise FormatError("its pickle is broken: it calls something without arguments")
        self.spend(HEAVY)
        meaning = known.KNOWN.get(function.name) if isinstance(function, Global) else None
        if meaning is not None:
            return meaning(self.spend, *args)
        self.spend(CALL)
        self.suspect(function, args)
        self.record(f"{brief(function)}{brief(args)}")
        return Unknown(brief(function), args)

    def suspect(self, function: Any, args: Any) -> None:
        """Refuse a call that only hostile files make: of such a name, or handing on such a name."""
        if isinstance(function, Global) and function.hostile:
            raise FormatError(_hostile(f"{function.name}{brief(args)}"))
        handed = next((item for item in globals_in(args) if item.hostile), None)
        if handed:
            raise FormatError(_hostile(f"{handed.name} by way of {brief(function)}"))

    def record(self, call: str) -> None:
        """Keep what would have been called."""
        if len(self.foreign) < MAX_FOREIGN:
            self.foreign[call] = None

    def build(self, state: Any) -> None:
        """Where pickle would have called `__setstate__`, or set attributes, of the value on top."""
        target = self.stack[-1]
        self.spend(CALL)
        self.suspect(target, (state,))
        if isinstance(target, Unknown):
            target.state = state
        elif isinstance(target, NumberType):
            target.order = known.byte_order(state)
        elif isinstance(target, Global):
            self.record(f"{target.name}.__setstate__({brief(state)})")
        elif not isinstance(target, dict):  # of an OrderedDict, attributes (`_metadata` of a state dict) are dropped
            raise FormatError("its pickle is broken: it sets the state of something that has none")

    def persistent(self, key: Any) -> Any:
        """What torch keeps outside the pickle: storages, and in old files the source text of modules."""
        self.spend(HEAVY)
        match key:
            case ("storage" | b"storage", Global() as kind, str() | bytes() | int() as name, _, int() as count, *view):
                key = _decode(name) if isinstance(name, bytes) else str(name)
                storage = known.storage(kind, key, count, view)
                self.storages.setdefault(key, storage)
                return storage
            case ("module" | b"module", Global() as kind, *_):
                return kind
        raise FormatError("its pickle refers to something outside that is no storage")


def _hostile(call: str) -> str:
    return f"it is hostile: its pickle calls {call[:100]}; nothing was executed; delete it"


def _decode(text: bytes) -> str:
    """The texts of Python 2 are bytes."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


# The opcodes

Operation = Callable[[Machine], None]
STOP = ord(".")


def _push(value: Any) -> Operation:
    return lambda m: m.push(value)


def _fresh(make: Callable[[], Any], steps: int) -> Operation:
    def operation(m: Machine) -> None:
        m.spend(steps)
        m.push(make())

    return operation


def _unpacked(layout: str, size: int) -> Operation:
    return lambda m: m.push(struct.unpack(layout, m.take(size))[0])


def _integer(size: int) -> Operation:
    return lambda m: m.push(m.number(size))


def _long(size: int) -> Operation:
    def operation(m: Machine) -> None:
        length = m.number(size)
        if length > MAX_INTEGER:
            raise FormatError("its pickle is broken: an integer of impossible length")
        m.push(int.from_bytes(m.take(length), "little", signed=True))

    return operation


def _unicode(size: int) -> Operation:
    return lambda m: m.push(m.text(size).decode("utf-8", "surrogatepass"))


def _old_text(size: int) -> Operation:
    return lambda m: m.push(_decode(m.text(size)))


def _bytes(size: int) -> Operation:
    return lambda m: m.push(m.text(size))


def _integer_line(m: Machine) -> None:
    text = m.line()
    m.push(text == b"01" if text in {b"00", b"01"} else int(text))


def _text_line(m: Machine) -> None:
    text = m.line()
    if len(text) < 2 or text[0] != text[-1] or text[:1] not in {b"'", b'"'}:
        raise FormatError("its pickle is broken: a text without quotes")
    m.push(_decode(codecs.escape_decode(text[1:-1])[0]))


def _unicode_line(m: Machine) -> None:
    m.push(m.line().decode("raw_unicode_escape"))


def _mark(m: Machine) -> None:
    m.marks.append(len(m.stack))


def _tuple(count: int) -> Operation:
    def operation(m: Machine) -> None:
        if len(m.stack) - (m.marks[-1] if m.marks else 0) < count:
            raise IndexError
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return operation


def _dict(m: Machine) -> None:
    items = m.pop_mark()
    m.spend(HEAVY)
    m.push({})
    m.fill(items)


def _frozenset(m: Machine) -> None:
    items = m.pop_mark()
    m.spend(HEAVY)
    m.push(frozenset(map(hashable, items)))


def _add_items(m: Machine) -> None:
    items = m.pop_mark()
    if not isinstance(m.stack[-1], set):
        raise FormatError("its pickle is broken: it fills something that is no set")
    m.stack[-1].update(map(hashable, items))


def _set_item(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    m.fill((key, value))


def _append(m: Machine) -> None:
    item = m.pop()
    m.extend((item,))


def _pop(m: Machine) -> None:
    if m.marks and m.marks[-1] == len(m.stack):
        m.marks.pop()
    else:
        m.stack.pop()


def _get(size: int) -> Operation:
    return lambda m: m.push(m.memo[m.number(size)])


def _put(size: int) -> Operation:
    return lambda m: m.remember(m.number(size))


def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise FormatError("its pickle is broken: a name that is no text")
    m.push(m.look_up(module, name))


def _reduce(m: Machine) -> None:
    args, function = m.pop(), m.pop()
    m.push(m.call(function, args))


def _new_object_ex(m: Machine) -> None:
    named, args, kind = m.pop(), m.pop(), m.pop()
    m.push(m.call(kind, (*args, named) if named else args))


def _instance(m: Machine) -> None:
    kind = m.name()
    m.push(m.call(kind, tuple(m.pop_mark())))


def _object(m: Machine) -> None:
    kind, *args = m.pop_mark()
    m.push(m.call(kind, tuple(args)))


def _refuse(reason: str) -> Operation:
    def operation(_: Machine) -> None:
        raise FormatError(reason)

    return operation


_EXTENSION = _refuse("its pickle uses the registry of extensions, which torch never does")
_OUTSIDE = _refuse("its pickle refers to something outside that is no storage")

OPERATIONS: dict[int, Operation] = {
    code[0]: operation
    for code, operation in {
        b"\x80": lambda m: m.take(1) and None, b"\x95": lambda m: m.take(8) and None,  # PROTO, FRAME
        b"(": _mark, b"0": _pop, b"1": lambda m: m.pop_mark() and None, b"2": lambda m: m.push(m.stack[-1]),
        b"N": _push(None), b"\x88": _push(True), b"\x89": _push(False),
        b"I": _integer_line, b"L": lambda m: m.push(int(m.line().removesuffix(b"L"))), b"K": _integer(1),
        b"M": _integer(2), b"J": _unpacked("<i", 4), b"\x8a": _long(1), b"\x8b": _long(4),
        b"F": lambda m: m.push(float(m.line())), b"G": _unpacked(">d", 8),
        b"S": _text_line, b"V": _unicode_line, b"U": _old_text(1), b"T": _old_text(4),
        b"\x8c": _unicode(1), b"X": _unicode(4), b"\x8d": _unicode(8),
        b"C": _bytes(1), b"B": _bytes(4), b"\x8e": _bytes(8), b"\x96": lambda m: m.push(bytearray(m.text(8))),
        b")": _push(()), b"\x85": _tuple(1), b"\x86": _tuple(2), b"\x87": _tuple(3),
        b"t": lambda m: m.push(tuple(m.pop_mark())),
        b"]": _fresh(list, 1), b"l": lambda m: m.push(m.pop_mark()), b"a": _append,
        b"e": lambda m: m.extend(m.pop_mark()),
        b"}": _fresh(dict, 1), b"d": _dict, b"s": _set_item, b"u": lambda m: m.fill(m.pop_mark()),
        b"\x8f": _fresh(set, HEAVY), b"\x91": _frozenset, b"\x90": _add_items,
        b"g": lambda m: m.push(m.memo[int(m.line())]), b"h": _get(1), b"j": _get(4),
        b"p": lambda m: m.remember(int(m.line())), b"q": _put(1), b"r": _put(4),
        b"\x94": lambda m: m.remember(len(m.memo)),
        b"c": lambda m: m.push(m.name()), b"\x93": _stack_global,
        b"R": _reduce, b"\x81": _reduce, b"\x92": _new_object_ex, b"i": _instance, b"o": _object,
        b"b": lambda m: m.build(m.pop()),
        b"Q": lambda m: m.push(m.persistent(m.pop())),
        b"P": _OUTSIDE, b"\x97": _OUTSIDE, b"\x98": _OUTSIDE,  # PERSID, NEXT_BUFFER, READONLY_BUFFER
        b"\x82": _EXTENSION, b"\x83": _EXTENSION, b"\x84": _EXTENSION,
    }.items()
}  # fmt: skip
