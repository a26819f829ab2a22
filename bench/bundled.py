"""How long from the command to the PNG with the bundled model? `python bench/bundled.py`"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import in_turn, write


def seconds(out: Path) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-m", "reverie", "generate", "a red apple", "--seed", "7", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write("bundled", in_turn({"command to PNG, seconds": lambda: seconds(Path(folder) / "a.png")}, rounds=7))
