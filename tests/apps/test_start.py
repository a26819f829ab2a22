"""Starting is quick: `import reverie` and `reverie --help` do not import torch."""

import statistics
import subprocess
import sys
import time

import pytest

import reverie
from reverie.engine.request import Request
from tests.apps.commandline import CommandLine, environment, run_apart

LIMIT = 1.0  # seconds; 0.3 is promised for a machine that does nothing else, and measured in bench/
HEAVY = ("torch", "numpy", "PIL", "safetensors", "tokenizers")


def loaded_by(code: str) -> list[str]:
    """Which heavy modules are loaded after `code`."""
    report = f"import sys; print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        capture_output=True, text=True, timeout=60, env=environment(), check=True,
    )  # fmt: skip
    return done.stdout.rpartition("loaded:")[2].split()


HELP = """
import sys
from reverie.apps.cli import main
sys.argv = ["reverie", *{words!r}]
try:
    main()
except SystemExit as left:
    assert left.code == 0, left
"""


def test_importing_the_library_imports_nothing_heavy() -> None:
    assert loaded_by("import reverie; dir(reverie); reverie.__version__") == []


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["generate", "--help"], ["train", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert loaded_by(HELP.format(words=words)) == []


def test_the_check_sees_torch() -> None:
    assert "torch" in loaded_by("import reverie; reverie.load")


def test_help_is_quick() -> None:
    took = []
    for _ in range(5):
        started = time.perf_counter()
        ran = run_apart("--help")
        took.append(time.perf_counter() - started)
        assert (ran.code, ran.err) == (0, "")
        assert "generate" in ran.out
    assert statistics.median(took) < LIMIT, took


def test_version() -> None:
    assert run_apart("--version").out == f"reverie {reverie.__version__}\n"


@pytest.mark.parametrize("words", [[], ["train"]])
def test_nothing_to_do_prints_the_help(cli: CommandLine, words: list[str]) -> None:
    ran = cli(*words)
    assert ran.code == 2
    assert ran.err.startswith("Usage: reverie")
    assert ran.err.count("\n") > 5


def test_every_field_of_a_request_has_its_flag(cli: CommandLine) -> None:
    ran = cli("generate", "--help")
    assert ran.code == 0
    words = ran.out.split()
    for name in Request.model_fields:
        assert name in words if name == "prompt" else f"--{name.replace('_', '-')}" in words


def test_every_flag_is_described(cli: CommandLine) -> None:
    text = " ".join(cli("generate", "--help").out.split())
    for field in Request.model_fields.values():
        assert str(field.description) in text


def test_public_names_are_there() -> None:
    for name in reverie.__all__:
        assert getattr(reverie, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        _ = reverie.Pipeline
