"""What every benchmark shares: run things in turn, take medians, say where and with what."""

import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "pydantic", "typer")


def in_turn(subjects: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Call each subject once a round, in turn; each returns its own figure. Median and spread (min, max)."""
    figures: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            figures[name].append(subject())
    return {name: spread(values) for name, values in figures.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least, most, and how many they are."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def cell(found: Mapping[str, float]) -> str:
    """A spread in a table: `1.23 (1.20–1.31)`."""
    return f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})"


def versions(packages: Mapping[str, str]) -> str:
    """Packages and their versions in words."""
    return ", ".join(f"{name} {number}" for name, number in packages.items())


def machine_words(place: Mapping[str, Any]) -> str:
    """A `machine` in words, with the commit."""
    return (
        f"{place['cores']} cores of {place['cpu']} ({', '.join(place['instructions'])}), Python {place['python']}, "
        f"{versions(place['packages'])}; commit {place['commit']}"
    )


def machine() -> dict[str, Any]:
    """Processor, versions, commit."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    flags = next((line for line in _cpuinfo() if line.startswith("flags")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "instructions": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in flags],
        "cores": len([line for line in _cpuinfo() if line.startswith("processor")]),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit.stdout.strip(),
    }


def write(name: str, figures: dict[str, Any]) -> None:
    """Print the figures and keep them in `bench/results`."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"figures": figures, "machine": machine()}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def into_document(heading: str, text: str) -> None:
    """Put a table under its heading in docs/performance.md; what else the document says stays."""
    old = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else "# Performance\n"
    before, _, after = old.partition(f"{heading}\n")
    comment, mark, rest = after.partition("<!-- measured -->\n")
    kept, _, tail = (rest if mark else "").partition("<!-- end -->\n")
    del kept
    own = f"{heading}\n{comment if mark else chr(10)}<!-- measured -->\n{text}\n<!-- end -->\n"
    DOCUMENT.write_text(f"{before.rstrip()}\n\n{own}{tail if mark else after}", encoding="utf-8")


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
