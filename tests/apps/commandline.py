"""Running the command line, inside this process and in one of its own."""

import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

import reverie
from reverie.apps.cli import main


@dataclass(frozen=True)
class Ran:
    """What one command did."""

    code: int
    out: str
    err: str


class CommandLine:
    """Calls `reverie.apps.cli.main` as the console entry does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *words: object) -> Ran:
        self.monkeypatch.setattr(sys, "argv", ["reverie", *map(str, words)])
        self.monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main replaces it
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = self.capsys.readouterr()
        code = left.value.code
        assert isinstance(code, int)
        return Ran(code, out, err)

    def refused(self, *words: object) -> str:
        """Run what must be refused: exit code 2, nothing on stdout, one line on stderr. Returns the line."""
        return one_line(self(*words), 2)


def one_line(ran: Ran, code: int) -> str:
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.endswith("\n")
    assert ran.err.count("\n") == 1
    assert "Traceback" not in ran.err
    assert "defect" not in ran.err
    return ran.err[:-1]


def environment() -> dict[str, str]:
    """For a process of its own, whether the package is installed or not."""
    source = str(Path(reverie.__file__).parent.parent)
    return os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


def run_apart(*words: object) -> Ran:
    """`python -m reverie ...` in a process of its own."""
    command = [sys.executable, "-m", "reverie", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), check=False)
    return Ran(done.returncode, done.stdout, done.stderr)
