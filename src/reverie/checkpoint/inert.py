"""What a pickle describes, as plain data: names looked up, calls that were not made, tensors by their storage.

And which names only hostile files call. The list decides between a refusal and a note: nothing in a file is ever
called, whether its name is on the list or not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

MAX_HASHED = 1 << 60  # integers below hash to themselves: no table of colliding keys can be built
SEARCHED = 64  # arguments of a call that are looked through for names

# What only hostile files call: everything of a module, or one name of it.
HOSTILE_MODULES = frozenset({
    "os", "posix", "nt", "ntpath", "posixpath", "subprocess", "sys", "socket", "runpy", "importlib", "imp", "shutil",
    "webbrowser", "pty", "commands", "popen2", "ctypes", "_ctypes", "cffi", "multiprocessing", "_posixsubprocess",
    "asyncio", "concurrent", "threading", "_thread", "signal", "code", "codeop", "pdb", "bdb", "cProfile", "profile",
    "trace", "timeit", "pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib",
    "zipimport", "pkgutil", "pip", "pydoc", "doctest", "distutils", "setuptools", "tempfile", "fileinput", "codecs",
    "http", "urllib", "urllib2", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib", "ssl",
    "linecache", "gc", "atexit", "sysconfig", "venv", "ensurepip", "idlelib", "tarfile", "zipfile", "sqlite3",
    "winreg", "_winapi",
})  # fmt: skip
HOSTILE_NAMES = frozenset(f"{module}.{name}" for module, names in {
    "builtins": ("eval", "exec", "execfile", "compile", "open", "file", "__import__", "getattr", "setattr", "delattr",
        "globals", "locals", "vars", "input", "breakpoint", "apply", "map", "filter"),
    "io": ("open", "open_code", "FileIO"),
    "_io": ("open", "open_code", "FileIO"),
    "operator": ("attrgetter", "methodcaller", "call"),
    "_operator": ("attrgetter", "methodcaller", "call"),
    "types": ("CodeType", "FunctionType", "LambdaType", "MethodType", "ModuleType"),
    "new": ("function", "code"),
    "torch": ("load", "jit.load", "serialization.load", "package.PackageImporter"),
    "numpy": ("load", "fromfile", "memmap"),
    "pandas": ("read_pickle", "io.pickle.read_pickle"),
}.items() for name in names)  # fmt: skip
HOSTILE_PREFIXES = ("torch.hub.", "torch.utils.cpp_extension.", "numpy.testing.", "numpy.f2py.", "numpy.distutils.")

# Modules that were renamed between Python 2 and 3, and between versions of numpy and torch.
RENAMED = {
    "__builtin__": "builtins", "copy_reg": "copyreg", "numpy._core.multiarray": "numpy.core.multiarray",
    "torch.tensor": "torch._tensor",
}  # fmt: skip


class FormatError(Exception):
    """Why something is not read, on its way to the CheckpointError that also names the file."""


@dataclass(frozen=True, eq=False)
class Global:
    """A name that was looked up, and nothing more."""

    name: str
    hostile: bool = False


@dataclass(eq=False, slots=True)
class Unknown:
    """What a call would have made.

    Attributes:
        name: what would have been called.
        args: with what.
        state: what would have been handed to `__setstate__`.
        table: what would have been set as items.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    table: dict[Any, Any] | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """The memory behind tensors.

    Attributes:
        key: its name in the file.
        kind: the type of its numbers (`"float32"`), or `"untyped"`.
        count: how many, or how many bytes.
        offset: where it begins inside the storage of that key, as very old files write views.
    """

    key: str
    kind: str
    count: int
    offset: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class Rebuilt:
    """A tensor as torch describes it: a window on a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    kind: str
    conjugated: bool = False
    negated: bool = False


@dataclass(eq=False, slots=True)
class NumberType:
    """A numpy dtype: `"f8"` and its byte order."""

    code: str
    order: str = "<"


def look_up(module: str, name: str) -> Global:
    """A name, not its meaning."""
    full = f"{RENAMED.get(module, module)}.{name}"
    full = full if full.isprintable() else ascii(full)[1:-1]  # it goes into messages
    hostile = (
        full.partition(".")[0] in HOSTILE_MODULES
        or full in HOSTILE_NAMES
        or full.startswith(HOSTILE_PREFIXES)
        or ("." in name and not HOSTILE_MODULES.isdisjoint(name.split(".")))  # torch.serialization, os.system
    )
    return Global(full, hostile)


def hashable(value: Any) -> Any:
    """A key for a table: what could be made to collide, or to hash for ever, is only known by its identity."""
    if value is None or isinstance(value, (str, bytes, float, Global, Unknown)):
        return value
    if isinstance(value, int) and abs(value) < MAX_HASHED:
        return value
    return Unknown("a key", (value,))


def globals_in(value: Any) -> Iterator[Global]:
    """The names in the arguments of a call, as far as `SEARCHED` goes."""
    left = [value]
    for _ in range(SEARCHED):
        if not left:
            return
        item = left.pop()
        if isinstance(item, Global):
            yield item
        elif isinstance(item, (tuple, list)):
            left.extend(item[:SEARCHED])
        elif isinstance(item, dict):
            left.extend(islice(item.values(), SEARCHED))
        elif isinstance(item, Unknown):
            left += [item.args, item.state]


def brief(value: Any, depth: int = 2) -> str:
    """A value as it would stand in a program, short and on one line."""
    if value is None or isinstance(value, (bool, float, complex)):
        return repr(value)
    if isinstance(value, (str, bytes, bytearray)):
        return repr(value[:60])
    if isinstance(value, (Global, Unknown)):
        return value.name
    if isinstance(value, (tuple, list)) and (depth or not value):
        inner = ", ".join([brief(item, depth - 1) for item in value[:4]] + ["..."] * (len(value) > 4))
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    return repr(value) if isinstance(value, int) and abs(value) < MAX_HASHED else "..."
