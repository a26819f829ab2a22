"""Safetensors files written by hand, byte by byte, so that every part can be wrong."""

import json
from pathlib import Path
from typing import Any

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a file; `length` is what its first 8 bytes claim."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def with_header(header: Any, data: bytes = b"\0" * 8) -> bytes:
    """The bytes of a file from a header as JSON."""
    return raw(json.dumps(header).encode(), data)


def entry(dtype: str = "F32", shape: Any = (2,), start: Any = 0, end: Any = 8) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write(path: Path, content: bytes) -> Path:
    """Write and return the path."""
    path.write_bytes(content)
    return path
