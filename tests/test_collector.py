"""Garbage is not looked for while a model opens, and is afterwards."""

import gc
from pathlib import Path

import pytest

from reverie.checkpoint.source import open_weights
from reverie.collector import paused_collector
from reverie.errors import CheckpointError


def test_paused_and_active_again() -> None:
    with paused_collector():
        assert not gc.isenabled()
        with paused_collector():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_active_again_after_a_failure(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nothing that opens")
    with pytest.raises(CheckpointError):
        open_weights(tmp_path / "broken.safetensors")
    assert gc.isenabled()


def test_who_paused_it_stays_in_charge() -> None:
    gc.disable()
    try:
        with paused_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
