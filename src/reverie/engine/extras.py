"""The fields of adapters: what a request says of LoRAs, control nets and picture prompts, and how it is written."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from reverie.engine.fields import Settings, Written, number

Strength = Annotated[float, Field(ge=-10, le=10)]
Share = Annotated[float, Field(ge=0, le=1)]
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
SETTING = re.compile(r"[a-z_]+(\.[\w.]+)?=[^=]*")
FILE = re.compile(r"\.[A-Za-z]\w*$")


def written(text: str, numbers: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """`"FILE:0.8:0:0.5:key=value,key=value"` -> what stands before, and the fields.

    Args:
        text: numbers and settings are taken from its end, so that a path may have colons.
        numbers: the fields that numbers stand for, in their order; a setting `group.key=value` goes into a group.

    Raises:
        ValueError: more numbers than fields, or behind a file's name what is neither number nor setting.
    """
    head, found, settings = text, list[str](), dict[str, Any]()
    while ":" in head:
        rest, _, last = head.rpartition(":")
        if NUMBER.fullmatch(last):
            found.insert(0, last)
        elif all(SETTING.fullmatch(part) for part in last.split(",")):
            settings = _settings(last) | settings
        elif last:
            if FILE.search(rest) and not {"/", "\\"} & set(last):
                raise ValueError(f"ends in {last!r}; expected numbers ({', '.join(numbers)}) or setting=value")
            break
        head = rest
    if len(found) > len(numbers):
        raise ValueError(f"has {len(found)} numbers; expected {', '.join(numbers)}")
    return head, dict(zip(numbers, found, strict=False)) | settings


def _settings(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        group, dot, inner = key.partition(".")
        if dot:
            found.setdefault(group, {})[inner] = number(value)
        else:
            found[key] = value
    return found


def _pictures(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _factors(value: Any) -> Any:
    return tuple(value.split("+")) if isinstance(value, str) else value


class Adapter(Written):
    """What every adapter has.

    Attributes:
        strength: 1 is what it was made for, 0 is nothing.
        start, end: fractions of the steps between which it acts.
    """

    strength: Strength = Field(1.0, description="how strongly, 1 as it was made")
    start: Share = Field(0.0, description="fraction of the steps before it begins")
    end: Share = Field(1.0, description="fraction of the steps after which it ends")

    @model_validator(mode="after")
    def _in_order(self) -> "Adapter":
        if self.start > self.end:
            raise ValueError(f"starts at {self.start:g} and ends before, at {self.end:g}")
        return self


class Lora(Adapter):
    """A LoRA, or a file of one of its kin. Written `FILE:0.8`, or `FILE:0.8:0.5`, in the text encoders 0.5."""

    path: str = Field(description="file, or the name of one in the library")
    text_strength: Strength | None = Field(None, description="in the text encoders; as `strength` if absent")
    blocks: Settings = Field(default_factory=dict, description="factors by block: down.1=0.5,mid=0")
    way: Literal["auto", "merge", "branch"] = Field(
        "auto", description="added to the weights, or computed beside them; chosen if auto"
    )

    @classmethod
    def of_text(cls, text: str) -> dict[str, Any]:
        """See `Written`."""
        path, fields = written(text, ("strength", "text_strength"))
        return {"path": path} | fields


class Control(Adapter):
    """A picture that a control net or T2I-Adapter follows. Written `canny:PICTURE:1.0:0:0.8`."""

    kind: str = Field(
        min_length=1, description="what it follows: canny, depth, pose...; says which net and preprocessor are meant"
    )
    picture: str = Field(min_length=1, description="a file or a data: URL")
    net: str | None = Field(None, description="its file or folder, or a name; found by `kind` if absent")
    preprocessor: str | None = Field(
        None, description="what is made of the picture before; `none` to take it as it is; by `kind` if absent"
    )
    options: Settings = Field(default_factory=dict, description="settings of the preprocessor")
    mode: Literal["balanced", "prompt", "control", "guess"] = Field(
        "balanced", description="which of the two matters more; guess: the picture alone (diffusers' guess mode)"
    )
    resize: Literal["stretch", "crop", "fill"] = Field(
        "crop", description="how the picture comes to the drawing's size"
    )
    mask: str | None = Field(None, description="picture: where it acts, white")
    blocks: Annotated[tuple[float, ...], BeforeValidator(_factors)] = Field(
        (), description="factors of the net's blocks, from the first down: 1+0.8+0.5..."
    )

    @classmethod
    def of_text(cls, text: str) -> dict[str, Any]:
        """See `Written`."""
        head, fields = written(text, ("strength", "start", "end"))
        kind, _, picture = head.partition(":")
        return {"kind": kind, "picture": picture} | fields


class ImagePrompt(Adapter):
    """Pictures that say what to draw. Written `PICTURE:0.6`, `PICTURE:0.6:adapter=FILE`, `PICTURE|PICTURE`."""

    pictures: Annotated[tuple[str, ...], BeforeValidator(_pictures)] = Field(
        min_length=1, description="files or data: URLs"
    )
    adapter: str | None = Field(None, description="the IP-Adapter's file, or a name; the library's only one if absent")
    encoder: str | None = Field(None, description="file or folder of the image encoder; found beside it if absent")
    faces: str | None = Field(
        None, description="file of a tensor (pictures, 512), embeddings of their faces by ArcFace; for FaceID's"
    )
    weight_type: str = Field("linear", description="how the strength changes from block to block")
    mask: str | None = Field(None, description="picture: where it acts, white")
    blocks: Settings = Field(default_factory=dict, description="factors by block: down.2=1,up.0=0.5")

    @classmethod
    def of_text(cls, text: str) -> dict[str, Any]:
        """See `Written`."""
        pictures, fields = written(text, ("strength", "start", "end"))
        return {"pictures": tuple(pictures.split("|"))} | fields
