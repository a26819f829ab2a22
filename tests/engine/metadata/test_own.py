"""Our own JSON."""

import base64
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings

import reverie
from reverie.engine.metadata import own
from reverie.engine.request import Request
from reverie.errors import RequestError
from tests.engine.metadata import samples

MODEL = {"name": "tiny", "source": "/models/tiny", "family": "sd1", "hash": "ab" * 32}
# What 0.1.0 wrote: no schema, no defaults.
OLD = """{"version": "0.1.0", "request": {"prompt": "a (red) apple", "negative_prompt": "", "width": 32, "height": 32,
"steps": 2, "guidance_scale": 3.0, "seed": 7, "count": 1, "batch_size": 1, "sampler": "ddim", "spacing": "leading",
"clip_skip": 1}, "model": {"name": "tiny", "source": "bundled", "family": "sd1", "hash": "abab"}}"""


@settings(max_examples=60, deadline=None)
@given(samples.requests(**samples.own_fields))
def test_every_field_is_read_back(request: Request) -> None:
    found = own.read(own.write(request, MODEL, {}))
    assert found.request == request
    assert found.model == MODEL
    assert found.program == f"Reverie {reverie.__version__}"
    assert found.notes == ()
    assert found.own


def test_every_default_is_explicit() -> None:
    record = json.loads(own.write(Request(prompt="a cat"), MODEL, {}))
    assert record.keys() == {"schema", "version", "request", "model"}
    assert record["request"].keys() == Request.model_fields.keys()
    assert record["schema"] == own.SCHEMA


def test_it_is_ascii() -> None:
    assert own.write(Request(prompt="ein Apfel 🍎, りんご"), MODEL, {}).isascii()


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:;base64,"])
def test_pictures_are_stored_as_their_hash(head: str) -> None:
    data = bytes(range(256)) * 100
    request = Request(prompt="a cat", image=head + base64.b64encode(data).decode(), mask="mask.png")
    text = own.write(request, MODEL, {"image": hashlib.sha256(data).hexdigest(), "mask": "cd" * 32})
    assert len(text) < 4000
    found = own.read(text)
    assert found.request.image == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert found.request.mask == "mask.png"
    assert found.notes == (
        f"image: {found.request.image} (the picture itself is not in the metadata; give it with --image)",
    )
    assert own.pictures(found) == {"image": hashlib.sha256(data).hexdigest(), "mask": "cd" * 32}


@pytest.mark.parametrize(("url", "data"), [("data:,a%20cat", b"a cat"), ("data:;base64,?", b"")])
def test_other_data_urls(url: str, data: bytes) -> None:
    assert own.picture_hash(url) == hashlib.sha256(data).hexdigest()


def test_what_0_1_wrote_is_still_read() -> None:
    found = own.read(OLD)
    assert found.fields == {
        "prompt": "a (red) apple", "negative_prompt": "", "width": 32, "height": 32, "steps": 2, "guidance_scale": 3.0,
        "seed": 7, "count": 1, "batch_size": 1, "sampler": "ddim", "spacing": "leading", "clip_skip": 1,
        "dialect": "plain", "dynamic_prompts": False, "rng": "cpu",
    }  # fmt: skip
    assert found.model["source"] == "bundled"


def test_every_schema_has_a_migration() -> None:
    assert own.MIGRATIONS.keys() == set(range(own.SCHEMA))
    assert own.migrated(json.loads(OLD))["schema"] == own.SCHEMA


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("", "not JSON"), ("{", "not JSON"), ("[]", "expected a JSON object"), ("3", "expected a JSON object"),
        ("[" * 100_000, "nested too deeply"), ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ({}, "no objects request and model"), ({"request": {}}, "no objects"),
        ({"request": 3, "model": {}}, "no objects"),
        ({"schema": own.SCHEMA + 1, "request": {}, "model": {}}, "update it"),
        ({"schema": -1, "request": {}, "model": {}}, "schema -1"), ({"schema": "x" * 999}, "this version reads up to"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_damaged_records(record: Any, said: str) -> None:
    with pytest.raises(RequestError, match=r"^does not carry a request of Reverie") as caught:
        own.read(record if isinstance(record, str) else json.dumps(record))
    assert said in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"stepz": 3}, "did you mean steps"), ({"steps": "many"}, "steps is 'many'"), ({"hires": {"x": {}}}, "hires.x")],
)
def test_a_picture_of_ours_is_drawn_as_it_was_or_not_at_all(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        own.read(json.dumps({"request": fields, "model": {}}))


def test_half_a_surrogate_pair() -> None:
    found = own.read(r'{"request": {"prompt": "\ud83d\ude00 \ud83d"}, "model": {}}')
    assert found.request.prompt == "😀 \ufffd"
