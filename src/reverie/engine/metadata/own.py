"""Our own JSON: everything that made a picture, with every default made explicit."""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from reverie import __version__
from reverie.engine.metadata.report import Found, Notes, parse_object, whole
from reverie.engine.request import Request
from reverie.errors import RequestError

SCHEMA = 1  # counts up when a field changes its name or meaning; `MIGRATIONS` brings older ones here
PROGRAM = "Reverie"
HASHED = "sha256:"  # instead of a picture that came as a data: URL
Record = dict[str, Any]


def stored(request: Request) -> Record:
    """All fields as JSON values, the defaults too; pictures in `data:` URLs as their SHA-256."""
    fields: Record = _light(request.model_dump(mode="json"))
    return fields


def write(request: Request, model: Mapping[str, str], pictures: Mapping[str, str]) -> str:
    """The JSON of one picture, in ASCII.

    Args:
        request: resolved, for this picture alone.
        model: name, source, family and hash.
        pictures: SHA-256 of the files that the request begins with, by field.
    """
    record = {"schema": SCHEMA, "version": __version__, "request": stored(request), "model": dict(model)}
    return json.dumps(record | ({"pictures": dict(pictures)} if pictures else {}))


def read(text: str) -> Found:
    """What `write` wrote, in this version or an older one. A picture of ours is drawn again as it was or not at all.

    Raises:
        RequestError: not such JSON, of a newer version, or with a field that cannot be.
    """
    try:
        record = migrated(parse_object(text, "its text"))
    except RequestError as error:
        raise RequestError(f"does not carry a request of Reverie that can be read: {error}") from None
    fields, model = record.get("request"), record.get("model")
    if not isinstance(fields, dict) or not isinstance(model, dict):
        raise RequestError("does not carry a request of Reverie: its text has no objects request and model")
    request = Request.of(**whole(fields))
    notes = Notes()
    for name in _missing(request):
        notes.add(name, getattr(request, name), f"the picture itself is not in the metadata; give it with --{name}")
    named = {str(key): str(value) for key, value in model.items()}
    return Found(f"{PROGRAM} {record.get('version', '')}".strip(), request, named, notes.lines(), text)


def pictures(found: Found) -> dict[str, str]:
    """SHA-256 of the files that a picture of ours was drawn from, by field."""
    hashes = parse_object(found.text, "its text").get("pictures") if found.own and found.text.startswith("{") else None
    return {str(name): str(hash_) for name, hash_ in hashes.items()} if isinstance(hashes, dict) else {}


def picture_hash(url: str) -> str:
    """SHA-256 of the picture in a `data:` URL."""
    head, _, body = url.partition(",")
    try:
        data = base64.b64decode(body) if head.endswith(";base64") else unquote_to_bytes(body)
    except binascii.Error:
        data = body.encode()
    return hashlib.sha256(data).hexdigest()


def migrated(record: Record) -> Record:
    """A record of any older schema as one of the present.

    Raises:
        RequestError: it is newer than this program.
    """
    schema = record.get("schema", 0)
    if not isinstance(schema, int) or not 0 <= schema <= SCHEMA:
        raise RequestError(f"it has schema {schema!r:.40}, this version reads up to {SCHEMA}; update it")
    for version in range(schema, SCHEMA):
        record = MIGRATIONS[version](record)
    return record


def _plain_words(record: Record) -> Record:
    """0.1.0 wrote no schema and no defaults; it read prompts as plain words, without weights or wildcards."""
    request = record.get("request")
    if isinstance(request, dict):
        request = {"dialect": "plain", "dynamic_prompts": False, "rng": "cpu"} | request
    return record | {"schema": 1, "request": request}


MIGRATIONS: dict[int, Callable[[Record], Record]] = {0: _plain_words}


def _light(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _light(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_light(inner) for inner in value]
    return HASHED + picture_hash(value) if isinstance(value, str) and value.startswith("data:") else value


def _missing(request: Request) -> list[str]:
    """The fields whose pictures are known only by their SHA-256."""
    fields = request.model_dump(mode="json", exclude_defaults=True).items()
    return [name for name, value in fields if f'"{HASHED}' in json.dumps(value)]
