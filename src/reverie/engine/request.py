"""The request: every field that decides a picture. Flags, metadata and documentation are derived from it."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reverie.errors import RequestError

MAX_SEED = 2**63 - 1


class Request(BaseModel):
    """What to draw. A field that is None is decided by the model's own defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field("", description="what the picture shows")
    negative_prompt: str = Field("", description="what it must not show")
    width: int | None = Field(None, ge=8, le=8192, description="pixels drawn across (before the upscaler)")
    height: int | None = Field(None, ge=8, le=8192, description="pixels drawn down (before the upscaler)")
    steps: int | None = Field(None, ge=1, le=1000, description="sampling steps")
    guidance_scale: float | None = Field(
        None, ge=0, le=100, description="how strongly the prompt pulls; 1 is no guidance"
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="of the first picture, the next has seed + 1; random if absent"
    )
    count: int = Field(1, ge=1, le=1000, description="number of pictures")
    batch_size: int = Field(1, ge=1, le=64, description="pictures drawn at once; faster, uses more memory")
    sampler: str | None = Field(None, description="name or alias; see `reverie samplers`")
    spacing: str | None = Field(
        None, description="which noise levels are visited: leading, trailing, linspace, karras, exponential"
    )
    eta: float | None = Field(None, ge=0, le=1, description="share of fresh noise in ddim and euler_a")
    clip_skip: int = Field(1, ge=1, le=12, description="2 leaves out the text encoder's last layer, 1 none")
    upscaler: str | None = Field(None, description="post-step: a name, or `none`")

    @classmethod
    def of(cls, /, **fields: Any) -> Self:
        """Build a request.

        Raises:
            RequestError: one line for the first field that cannot be.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise RequestError(explain(error, cls)) from None


def explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first problem of a validation error in one line: what was found, what was expected."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "request"
    if first["type"] == "extra_forbidden":
        import difflib

        near = difflib.get_close_matches(name, kind.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; fields are {', '.join(kind.model_fields)}"
        return f"unknown field {name!r}{hint}"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{name} is {first['input']!r}: {message}"
