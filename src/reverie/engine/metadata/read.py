"""What made a picture: finds which program's metadata it carries, and reads them."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from reverie.engine.metadata import (
    a1111_read,
    comfy,
    containers,
    drawthings,
    easydiffusion,
    fooocus,
    infotext,
    invoke,
    novelai,
    own,
    swarm,
)
from reverie.engine.metadata.containers import OWN, PARAMETERS
from reverie.engine.metadata.report import Found
from reverie.engine.request import Request
from reverie.errors import RequestError

FOOOCUS_KEYS = {"base_model", "full_prompt", "performance"}


def read_metadata(source: Path | IO[bytes]) -> Found:
    """What made a picture, of ours or of another program.

    Reads Reverie, AUTOMATIC1111 and those who write its text (Forge, SD.Next, Civitai, stable-diffusion.cpp),
    ComfyUI, InvokeAI, NovelAI, Fooocus, SwarmUI, Draw Things and Easy Diffusion.

    Args:
        source: a file, or an open one.

    Raises:
        RequestError: not a picture, or without metadata that can be read; the message says what there is.
    """
    carried = containers.read(source)
    what = str(source) if isinstance(source, Path) else "the picture"
    try:
        found = read_texts(carried.texts)
    except RequestError as error:
        raise RequestError(f"{what} {error}" if str(error).startswith("does not") else f"{what}: {error}") from None
    if found.program == novelai.PROGRAM and found.request.width is None:  # as its first pictures did not say
        with suppress(RequestError):  # a picture that is too small or too large to be drawn
            width, height = carried.size
            return replace(found, request=Request.of(**found.fields | {"width": width, "height": height}))
    return found


def read_texts(texts: dict[str, str]) -> Found:
    """As `read_metadata`, from the texts of a picture by their keywords.

    Raises:
        RequestError: none of them is of a program that is known.
    """
    for is_one, read in OF_TEXTS:
        if is_one(texts):
            return read(texts)
    for keyword in (PARAMETERS, "Comment", "comment", "stealth"):
        if _tells(texts.get(keyword, "")):
            return read_text(texts[keyword])
    raise RequestError(_nothing(texts))


def read_text(text: str) -> Found:
    """As `read_metadata`, from one text: the JSON of any program that is known, else AUTOMATIC1111's `parameters`.

    Raises:
        RequestError: JSON that is of no program that is known; a text that is too long.
    """
    if len(text) > containers.MOST_TEXT:
        raise RequestError(f"the text has {len(text):,} characters; at most {containers.MOST_TEXT:,} are read")
    settings = _object(text)
    if settings is None:
        return a1111_read.read(text)
    return next(read(text, settings) for is_one, read in OF_JSON if is_one(settings))


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, None if it is none."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _tells(text: str) -> bool:
    """Whether a comment is about the making of a picture: JSON, or settings, which cameras do not write."""
    return text.lstrip().startswith("{") or infotext.has_settings(text)


def _graph_or_text(texts: dict[str, str]) -> Found:
    """ComfyUI's graph; where it cannot be read, the text that some of its nodes write beside it."""
    try:
        return comfy.read(texts["prompt"])
    except RequestError:
        if not _tells(texts.get(PARAMETERS, "")):
            raise
        return read_text(texts[PARAMETERS])


def _nothing(texts: dict[str, str]) -> str:
    if "workflow" in texts:
        return (
            "it has only ComfyUI's `workflow`, which says how the page looked, not what ran; save it in ComfyUI with "
            "its `prompt`, or export the graph in API format"
        )
    there = ", ".join(sorted(texts)[:10])
    return (
        "does not carry a request of Reverie, nor the metadata of another program that is known "
        f"({f'its texts are {there}' if there else 'it has no text'})"
    )


OF_TEXTS: tuple[tuple[Callable[[dict[str, str]], bool], Callable[[dict[str, str]], Found]], ...] = (
    (lambda texts: OWN in texts, lambda texts: own.read(texts[OWN])),
    (invoke.is_one, invoke.read),
    (novelai.is_one, novelai.read),
    (easydiffusion.is_one, lambda texts: easydiffusion.read(texts, json.dumps(texts))),
    (lambda texts: "prompt" in texts, _graph_or_text),
    (lambda texts: drawthings.is_one(texts.get("xmp", "")), lambda texts: drawthings.read(texts["xmp"])),
)
Settings = dict[str, Any]
OF_JSON: tuple[tuple[Callable[[Settings], bool], Callable[[str, Settings], Found]], ...] = (
    (lambda settings: "sui_image_params" in settings, lambda text, _: swarm.read(text)),
    (lambda settings: "request" in settings, lambda text, _: own.read(text)),
    (novelai.is_one, lambda _, settings: novelai.read(settings)),
    (easydiffusion.is_one, lambda text, settings: easydiffusion.read(settings, text)),
    (lambda settings: "positive_prompt" in settings, lambda text, _: invoke.read({"invokeai_metadata": text})),
    (lambda settings: bool(FOOOCUS_KEYS & settings.keys()), lambda text, _: fooocus.read(text)),
    (lambda settings: {"uc", "scale"} <= settings.keys(), lambda _, settings: novelai.read({"Comment": settings})),
    (lambda settings: True, comfy.read),
)
