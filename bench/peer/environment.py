"""An environment of the peers' own: a virtual environment in the cache, one set of requirements after the other."""

import hashlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
GROUPS = {"torch": "requirements.txt", "openvino": "requirements-openvino.txt", "sdcpp": "requirements-sdcpp.txt"}
BUILD_MINUTES = 25  # a source build that takes longer is given up


class Environment:
    """Where the peers are installed, and what they leave behind.

    Args:
        folder: for the virtual environment, checkpoints and caches.
        existing: the Python of an environment that is taken as it is instead.
    """

    def __init__(self, folder: Path, existing: Path | None = None) -> None:
        self.folder = folder
        self.python = existing or folder / "venv" / "bin" / "python"
        self._existing = existing is not None

    def install(self, groups: list[str]) -> dict[str, str]:
        """Install what is missing. What could not be, with the reason in a line; asked for again, it is tried again."""
        if not self.python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(self.folder / "venv")], check=True)
        return {group: why for group in groups if (why := "" if self._existing else self._install(group))}

    def _install(self, group: str) -> str:
        requirements = HERE / GROUPS[group]
        wanted = [*(_own_dependencies() if group == "torch" else ()), "-r", str(requirements)]
        mark = self.folder / f"{group}.{hashlib.sha256(repr(wanted).encode() + requirements.read_bytes()).hexdigest()}"
        if mark.exists():
            return ""
        print(f"installing {group} ...", file=sys.stderr)
        command = [str(self.python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), *wanted]
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=60 * BUILD_MINUTES, env=_gently()
            )
        except subprocess.TimeoutExpired:
            return f"not installed within {BUILD_MINUTES} minutes"
        if done.returncode:
            return f"not installed: {last_line(done.stderr)}"
        mark.touch()
        return ""

    def variables(self) -> dict[str, str]:
        """What a process of the environment finds in its surroundings; caches are kept from one to the next."""
        own = {
            "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT / "bench"))),
            "PYTHONPYCACHEPREFIX": str(self.folder / "pyc"),
            "XDG_CACHE_HOME": str(self.folder / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return inherited | own


def last_line(text: str) -> str:
    """The last line that says something, without what pip says of itself; cut where it is long."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("[notice]")]
    return lines[-1][:200] if lines else "no reason was given"


def _own_dependencies() -> list[str]:
    """Reverie's: it runs in the same environment, on the same torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["dependencies"])


def _gently() -> dict[str, str]:
    """One job of a compiler less than there are processors."""
    jobs = str(max((os.cpu_count() or 2) - 1, 1))
    return os.environ | {"CMAKE_BUILD_PARALLEL_LEVEL": jobs, "MAKEFLAGS": f"-j{jobs}"}
