"""Run by test_hostile.py in a process of its own: opens the paths it is given and says what came of it.

Standard input: a JSON object, name -> path. Standard output: one JSON object, name -> what was said, seconds of the
processor, peak memory so far in bytes, and what Python's audit hooks saw of execution and of files elsewhere.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from reverie.checkpoint.source import open_sharded, open_weights
from reverie.errors import CheckpointError

EXECUTION = {
    "exec", "compile", "import", "marshal.loads", "pickle.find_class", "os.system", "os.exec", "os.fork", "os.spawn",
    "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.__new__", "ctypes.dlopen", "code.__new__",
    "object.__setattr__", "os.remove", "os.rename", "shutil.rmtree", "webbrowser.open", "pty.spawn", "urllib.Request",
}  # fmt: skip


def peak() -> int:
    """Bytes of memory that this process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def attempt(path: Path) -> str:
    """The line with which a file is refused, or why it is not."""
    try:
        opened = open_sharded(path) if path.name.endswith(".index.json") else open_weights(path)
    except CheckpointError as error:
        return str(error)
    except Exception as error:
        return f"CRASHED {error!r}"
    return f"READ {opened!r}"


def main() -> None:
    """Open everything."""
    paths = json.load(sys.stdin)
    for codec in ("unicode_escape", "raw_unicode_escape", "latin-1", "ascii"):
        "".encode(codec)  # the codecs are modules: they are imported when they are first used
    seen: list[str] = []
    folder = ""

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in EXECUTION or (event == "open" and not str(args[0]).startswith(folder)):
            seen.append(f"{event} {args[:1]}"[:100])

    first = peak()
    results = {}
    sys.addaudithook(watch)
    for name, path in paths.items():
        folder = str(Path(path).parent)
        seen.clear()
        start = time.process_time()
        said = attempt(Path(path))
        results[name] = [said, time.process_time() - start, peak() - first, list(seen)]
    folder = ""
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
