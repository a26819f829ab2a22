"""`reverie read`: what made a picture, in words or as something that makes it again."""

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from reverie.apps import console
from reverie.engine.hashes import hash_paths
from reverie.engine.image import BUNDLED_SOURCE
from reverie.engine.metadata import a1111
from reverie.engine.metadata.infotext import has_settings
from reverie.engine.metadata.own import HASHED, pictures
from reverie.engine.metadata.read import read_metadata
from reverie.engine.metadata.report import Found
from reverie.engine.request import Request
from reverie.errors import RequestError

# Control characters but tab and line feed, and those that turn the direction of writing: a terminal would obey.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# Fields of several values that are written in one word each: what stands before the settings.
WRITTEN: dict[str, tuple[str, ...]] = {
    "guides": ("name",), "loras": ("path",), "controls": ("kind", "picture"), "image-prompts": ("pictures",),
    "embeddings": (),
}  # fmt: skip


def run_read(path: Path, form: str = "report") -> None:
    """Print what made the picture; what could not be carried goes to stderr, but in the report to stdout.

    Args:
        path: the picture.
        form: `report`, `cli` (a command line), `python`, `json` (the request) or `a1111` (the `parameters` text).

    Raises:
        RequestError: not a picture, without metadata that can be read, or no such form.
    """
    if form not in WRITERS:
        raise RequestError(f"unknown form {form!r}; known: {', '.join(WRITERS)}")
    found = read_metadata(path)
    console.out.print(printable(WRITERS[form](found)), markup=False, emoji=False)
    if form != "report":
        for note in found.notes:
            console.note(printable(f"not carried: {note}"))


def redraw(path: Path, given: Mapping[str, Any]) -> tuple[Request, Found]:
    """The request that draws a picture again, with some fields otherwise.

    Args:
        path: a picture of ours or of another program.
        given: fields that go before those of the picture; of a group (`hires`) only the ones that are given.

    Returns:
        the request, and what was found, whose notes say what will be different.

    Raises:
        RequestError: not a picture, no metadata, a field that cannot be, a picture to start from that is not there.
    """
    found = read_metadata(path)
    fields = found.fields
    for name, value in given.items():
        group = fields.get(name)
        fields[name] = {**group, **value} if isinstance(group, dict) and isinstance(value, dict) else value
    request = Request.of(**fields)
    for name in ("image", "mask", "depth"):
        if (getattr(request, name) or "").startswith(HASHED):
            raise RequestError(f"{path} does not hold the picture it was drawn from; give it with --{name}")
    notes = (*(note for note in found.notes if note.partition(":")[0] not in given), *_changed(request, found))
    return request, replace(found, notes=notes)


def report(found: Found) -> str:
    """One line for each thing that is known; only fields that are no defaults."""
    fields = _telling(found.request)
    rows = [
        ("made by", found.program),
        ("model", "  ".join(found.model[k] for k in ("name", "hash") if k in found.model)),
    ]
    rows += [(name.replace("_", " "), _words(value)) for name, value in fields.items()]
    rows += [("not carried", note) for note in found.notes]
    return "\n".join(f"{key:<22}{value}" for key, value in rows if value)


def command_line(found: Found) -> str:
    """The `reverie generate` that draws it again, quoted for a POSIX shell."""
    fields = _telling(found.request)
    prompt = fields.pop("prompt", "")
    words = ["reverie", "generate"]
    if source := _source(found):
        words += ["--model", source]
    for name, value in fields.items():
        words += _flags(name.replace("_", "-"), value)
    if prompt:
        words += ["--", prompt] if prompt.startswith("-") else [prompt]
    return shlex.join(words)


def snippet(found: Found) -> str:
    """The same in Python."""
    source = _source(found)
    lines = [f"    {name}={value!r}," for name, value in _telling(found.request).items()]
    return "\n".join(
        ["import reverie", "", f"model = reverie.load({source!r})" if source else "model = reverie.load()",
         "result = model.generate(", *lines, ")", 'result.images[0].save("picture.png")']
    )  # fmt: skip


def as_json(found: Found) -> str:
    """The request, with every field that has a value."""
    return json.dumps(found.request.model_dump(mode="json", exclude_none=True), indent=2, ensure_ascii=False)


def parameters(found: Found) -> str:
    """AUTOMATIC1111's text: as it stands in the picture, or written anew."""
    stands = has_settings(found.text) and not found.text.lstrip().startswith("{")
    return found.text if stands else a1111.write(found.request, found.model)


def printable(text: str) -> str:
    """Text in which what a terminal would obey is spelled out."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _telling(request: Request) -> dict[str, Any]:
    """The fields that are no defaults, groups and lists as plain values."""
    return request.model_dump(exclude_defaults=True)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items()) or "yes"
    if isinstance(value, list | tuple):
        return "; ".join(_words(inner) for inner in value)
    return f"{value:g}" if isinstance(value, float) else str(value).replace("\n", f"\n{'':<22}")


def _source(found: Found) -> str | None:
    """The model to load; the bundled one if None."""
    source = found.model.get("source") or found.model.get("name")
    return None if source == BUNDLED_SOURCE else source


def _flags(name: str, value: Any) -> Iterator[str]:
    """A field as words of the command line."""
    if isinstance(value, dict) and not name.endswith("options"):
        yield from () if value else (f"--{name}",)
        for key, inner in value.items():
            yield from _flags(f"{name}-{key.replace('_', '-')}", inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (f"--{name}", f"{key}={_value(inner)}")
    elif name in WRITTEN:
        for group in value:
            yield from (f"--{name.removesuffix('s')}", _group(name, group))
    elif isinstance(value, bool):
        yield f"--{name}" if value else f"--no-{name}"
    else:
        text = ",".join(map(_value, value)) if isinstance(value, list | tuple) else _value(value)
        yield from (f"--{name}={text}",) if text.startswith("-") else (f"--{name}", text)


def _group(name: str, group: Any) -> str:
    """One guide or adapter in the form in which it is written; see `engine/request.py` and `engine/extras.py`."""
    if isinstance(group, str):
        return group
    left = dict(group)
    heads = [left.pop(key) for key in WRITTEN[name]]
    head = ":".join("|".join(part) if isinstance(part, list | tuple) else str(part) for part in heads)
    settings: dict[str, Any] = {}
    for key, value in left.items():
        inside = "" if name == "guides" else f"{key}."
        inner = {f"{inside}{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        settings |= {k: "+".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in inner.items()}
    return ":".join([head, *([",".join(f"{k}={_value(v)}" for k, v in settings.items())] if settings else [])])


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _changed(request: Request, found: Found) -> Iterator[str]:
    """Pictures to start from that are no longer the ones that were."""
    for name, hash_ in pictures(found).items():
        value = getattr(request, name, None)
        path = Path(value) if isinstance(value, str) and not value.startswith("data:") else None
        if (
            path is not None
            and value == getattr(found.request, name)
            and path.is_file()
            and hash_paths([path]) != hash_
        ):
            yield f"{name}: {path} (it has changed since; its SHA-256 was {hash_})"


WRITERS: dict[str, Callable[[Found], str]] = {
    "report": report, "cli": command_line, "python": snippet, "json": as_json, "a1111": parameters,
}  # fmt: skip
