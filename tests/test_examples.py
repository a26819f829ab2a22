"""The examples run as they stand, are short, and write a picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    out = tmp_path / "out.png"
    subprocess.run([sys.executable, "-W", "error", str(path), str(out)], check=True, env=os.environ, cwd=tmp_path)
    with Image.open(out) as image:
        low, high = image.convert("L").getextrema()
    assert high - low > 50  # type: ignore[operator]
