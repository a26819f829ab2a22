"""What was read of a picture's metadata: a request, the program and model that made it, what could not be carried."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any

from pydantic import ValidationError

from reverie.engine.request import Request
from reverie.errors import RequestError

MOST_NOTES = 100
SHOWN = 80  # characters of a value in a note
ADAPTERS = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,200}>")
# why something could not be carried
ADAPTER = "its file is not in the metadata; give it with --lora"
CONTROL = "the picture it follows is not in the metadata; give it with --control"
IN_PROMPT = "it stays in the prompt; its file is looked for by that name"
OWN_VAE = "the model's own VAE draws"
NO_IMAGE = "the picture itself is not in the metadata; give it with --image"
NO_MASK = "the mask itself is not in the metadata; give it with --mask"
NO_SETTING = "there is no such setting here"
NO_SAMPLER = "there is no such sampler here; the model's own is used"
NO_SPACING = "there is no such spacing here; the model's own is used"


@dataclass(frozen=True)
class Found:
    """What a picture says about its making.

    Attributes:
        program: who made it, with its version where that is known.
        request: the request that comes nearest; it has only the fields that the picture speaks of.
        model: `name`, `hash` (SHA-256 or its first digits) and, in pictures of our own, `source` and `family`.
        notes: one line for each thing that could not be carried: key, value, why.
        text: the metadata as they stand in the file.
    """

    program: str
    request: Request
    model: dict[str, str]
    notes: tuple[str, ...]
    text: str

    @property
    def own(self) -> bool:
        """Whether Reverie made it, so that the same model draws the same picture again."""
        return self.program.startswith("Reverie")

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that the picture speaks of, for `Request.of(**(fields | others))`."""
        return self.request.model_dump(exclude_unset=True)


class Notes:
    """Collects what cannot be carried; a hostile picture cannot make the list long."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}
        self._more = 0

    def add(self, key: str, value: object, why: str) -> None:
        """One line: key, value (shortened) and the reason."""
        if len(self._lines) < MOST_NOTES:
            self._lines[f"{shown(key)}: {shown(value)} ({why})"] = None
        else:
            self._more += 1

    def lines(self) -> tuple[str, ...]:
        """Each note once, in order."""
        return (*self._lines, *([f"and {self._more} more"] if self._more else []))


def shown(value: object) -> str:
    """A value in one short line that any terminal can print."""
    text = value[: 4 * SHOWN] if isinstance(value, str) else _written(value)[: 4 * SHOWN]
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _written(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return f"a {type(value).__name__}"


def settle(fields: Mapping[str, Any], notes: Notes) -> Request:
    """The request of those fields that can be; the others are noted."""
    left = {name: value for name, value in whole(fields).items() if _finite(name, value, notes)}
    while True:
        try:
            return Request(**left)
        except ValidationError as error:
            _drop(left, error, notes)


def _drop(fields: dict[str, Any], error: ValidationError, notes: Notes) -> None:
    """Take out what the error complains about: a field, or one entry of a group."""
    for one in error.errors(include_url=False, include_context=False):
        name, *inner = (str(part) for part in one["loc"])
        why = "there is no such field" if one["type"] == "extra_forbidden" else _lower(one["msg"])
        group = fields.get(name)
        if inner and isinstance(group, dict) and inner[0] in group:
            notes.add(f"{name}.{inner[0]}", group.pop(inner[0]), why)
        elif name in fields:
            notes.add(name, fields.pop(name), why)


def whole(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of fields and of the groups in them, whose text is Unicode and whose keys are."""
    return {
        _unicode(name): {_unicode(key): _unicode(inner) for key, inner in value.items()}
        if isinstance(value, dict)
        else _unicode(value)
        for name, value in fields.items()
    }


def _unicode(value: Any) -> Any:
    """Half a surrogate pair, which JSON can spell, becomes U+FFFD."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


def _lower(message: str) -> str:
    return message[0].lower() + message[1:]


def _finite(name: str, value: object, notes: Notes) -> bool:
    numbers: Iterable[object] = value.values() if isinstance(value, dict) else [value]
    if all(math.isfinite(number) for number in numbers if isinstance(number, float)):
        return True
    notes.add(name, str(value), "not a finite number")
    return False


def lora(name: object, strength: object = 1.0, text: object = None) -> dict[str, Any] | None:
    """A LoRA for the field `loras`: its file is looked for by its name alone, wherever it was there.

    Args:
        name: of the file, with folders of either system and its ending, or without; None is given back for others.
        strength, text: in the network, and in the text encoders if that differs.
    """
    stem = PureWindowsPath(name[:500]).name if isinstance(name, str) else ""
    stem = stem.removesuffix(".safetensors")
    if stem in {"", "None", ".", ".."}:
        return None
    found = {"path": stem, "strength": strength}
    return found if text in {None, strength} else found | {"text_strength": text}


def words(fields: dict[str, Any], notes: Notes, prompt: str, negative: str, *, literal: bool = True) -> None:
    """Set the prompts.

    Args:
        literal: the picture is drawn already, so that what looks like a wildcard stands for itself.
    """
    fields["prompt"] = prompt
    if negative:
        fields["negative_prompt"] = negative
    if literal and any(mark in prompt + negative for mark in ("{", "__")):
        fields["dynamic_prompts"] = False
    for tag in ADAPTERS.findall(f"{prompt}\n{negative}"):
        notes.add("Adapter", tag, IN_PROMPT)


def parse_json(text: str, what: str) -> Any:
    """JSON of unknown origin.

    Raises:
        RequestError: not JSON, nested too deeply, a number of thousands of digits; `what` is named.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"{what} is not JSON that can be read: {shown(reason)}") from None


def parse_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object of unknown origin.

    Raises:
        RequestError: as `parse_json`, or something other than an object.
    """
    value = parse_json(text, what)
    if not isinstance(value, dict):
        raise RequestError(f"{what} is {shown(value)}; expected a JSON object")
    return value
