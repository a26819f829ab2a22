"""The tiny models of tests/tiny.py for the tests of this folder: with few words, since every loading reads them."""

from functools import cache
from pathlib import Path

from reverie.families.base import Parts
from reverie.families.detect import load_parts
from tests import tiny

WORDS = 50  # merges that the tokenizers of folders keep


def folder_of(root: Path, kind: str) -> Path:
    """The diffusers folder."""
    return tiny.sd3_model(root, kind, WORDS) if kind in tiny.SD3_KINDS else tiny.model(root, kind, WORDS)


def file_of(root: Path, kind: str) -> Path:
    """The single file."""
    folder_of(root, kind)
    return tiny.sd3_file(root, kind) if kind in tiny.SD3_KINDS else tiny.model_file(root, kind)


@cache
def loaded(path: Path) -> Parts:
    """Opened once; nobody changes it."""
    return load_parts(path)
