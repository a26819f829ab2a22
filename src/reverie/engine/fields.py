"""What groups of a request's fields are made of."""

from abc import abstractmethod
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Pixels = Annotated[int, Field(ge=8, le=8192)]
Number = float | int | bool | str


class Fields(BaseModel):
    """A frozen group of fields; an unknown one is an error."""

    # Validators are made at the first request: `--help` needs none.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Written(Fields):
    """A group of fields that may also be written as one text, as it is in a flag."""

    @classmethod
    @abstractmethod
    def of_text(cls, text: str) -> dict[str, Any]:
        """The fields that a text says, not yet checked.

        Raises:
            ValueError: it is not written as such a group is.
        """

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return cls.of_text(value) if isinstance(value, str) else value


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
