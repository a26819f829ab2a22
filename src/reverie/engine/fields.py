"""What groups of a request's fields are made of."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Pixels = Annotated[int, Field(ge=8, le=8192)]
Number = float | int | bool | str


class Fields(BaseModel):
    """A frozen group of fields; an unknown one is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def number(text: str) -> Number:
    """A value as it is written: `3`, `0.5`, `true`, or a word."""
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def settings(written: Any) -> Any:
    """`"a=1,b=x"` or `["a=1", "b=x"]` -> `{"a": 1, "b": "x"}`; anything else is left to pydantic."""
    if isinstance(written, str):
        written = [written]
    if not isinstance(written, list | tuple):
        return written
    pairs = [part.partition("=") for text in written for part in str(text).split(",") if part.strip()]
    for key, equals, _ in pairs:
        if not equals or not key.strip():
            raise ValueError("expected setting=value")
    return {key.strip(): number(value.strip()) for key, _, value in pairs}


Settings = Annotated[dict[str, Number], BeforeValidator(settings)]
