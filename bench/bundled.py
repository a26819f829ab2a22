"""How long from the command to the first step and to the PNG with the bundled model? `python bench/bundled.py`"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import spread, write

ROUNDS = 7


def run(out: Path) -> dict[str, float]:
    """Seconds by the clock, and of processors, which do not know what else the machine does."""
    started, used = time.perf_counter(), os.times()
    command = [sys.executable, "-m", "reverie", "generate", "a red apple", "--seed", "7", "--json", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        events = [(json.loads(line), time.perf_counter() - started) for line in process.stdout]
    seconds, now = time.perf_counter() - started, os.times()
    first = next(at for event, at in events if event["event"] == "step" and event["done"] >= 1)
    work = now.children_user + now.children_system - used.children_user - used.children_system
    return {"command to the first step": first, "command to PNG": seconds, "processor seconds": work}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(Path(folder) / "a.png") for _ in range(ROUNDS)]
    write("bundled", {name: spread([found[name] for found in runs]) for name in runs[0]})
