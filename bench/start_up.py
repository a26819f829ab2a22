"""How long do `reverie --help` and `import reverie` take? `python bench/start_up.py`"""

import subprocess
import sys
import time
from functools import partial

from common import in_turn, write

COMMANDS = {
    "python alone": ["-c", "pass"],
    "import reverie": ["-c", "import reverie"],
    "reverie --help": ["-m", "reverie", "--help"],
    "import torch": ["-c", "import torch"],
}


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    subjects = {name: partial(seconds, arguments) for name, arguments in COMMANDS.items()}
    write("start_up", in_turn(subjects, rounds=11))
