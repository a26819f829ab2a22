"""The request: every field that decides a picture. Flags, metadata and documentation are derived from it."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from reverie.errors import RequestError

MAX_SEED = 2**63 - 1
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


class Guide(Fields):
    """One named guidance wrapper (see `reverie guides`) and its settings."""

    name: str = Field(description="name of the wrapper")
    options: Settings = Field(default_factory=dict, description="its settings")

    @model_validator(mode="before")
    @classmethod
    def _written(cls, value: Any) -> Any:
        """`"pag:scale=3,layers=mid+up.0"` is one too."""
        if not isinstance(value, str):
            return value
        name, _, options = value.partition(":")
        return {"name": name.strip(), "options": options}


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str | dict | Guide) else value


def _numbers(value: Any) -> Any:
    return tuple(part for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class Extend(Fields):
    """Outpainting: pixels to add on each side of `image`."""

    left: int = Field(0, ge=0, le=4096, description="pixels added on the left")
    top: int = Field(0, ge=0, le=4096, description="pixels added above")
    right: int = Field(0, ge=0, le=4096, description="pixels added on the right")
    bottom: int = Field(0, ge=0, le=4096, description="pixels added below")


class Hires(Fields):
    """The second pass of a hires fix: the picture is enlarged and drawn over."""

    scale: float = Field(2.0, ge=1, le=8, description="enlargement")
    width: Pixels | None = Field(None, description="pixels across, instead of the enlargement")
    height: Pixels | None = Field(None, description="pixels down, instead of the enlargement")
    upscaler: str = Field(
        "latent", description="latent, latent_nearest, latent_bicubic..., lanczos, or an upscaler's name or file"
    )
    strength: float = Field(0.7, ge=0, le=1, description="how much is drawn over, 0 nothing, 1 everything")
    steps: int | None = Field(None, ge=1, le=1000, description="steps of the second pass; as the first if absent")
    sampler: str | None = Field(None, description="sampler of the second pass; as the first if absent")
    spacing: str | None = Field(None, description="spacing of the second pass; as the first if absent")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="guidance scale of the second pass")
    prompt: str | None = Field(None, description="prompt of the second pass; as the first if absent")
    negative_prompt: str | None = Field(None, description="negative prompt of the second pass")


class Travel(Fields):
    """Frames on the way from this request to another prompt or seed."""

    frames: int = Field(16, ge=2, le=1000, description="number of frames, both ends included")
    prompt: str | None = Field(None, description="prompt at the end")
    negative_prompt: str | None = Field(None, description="negative prompt at the end")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="seed at the end")


class Tiles(Fields):
    """Tiled diffusion: the network sees overlapping windows of a large picture, their answers are averaged."""

    size: Pixels = Field(512, description="width and height of a window, in pixels")
    overlap: int = Field(64, ge=0, le=4096, description="pixels that neighbouring windows share")


class Request(Fields):
    """What to draw. A field that is None is decided by the model's own defaults, or by the preset."""

    # words
    prompt: str = Field("", description="what the picture shows")
    negative_prompt: str = Field("", description="what it must not show")
    dialect: str = Field("a1111", description="how prompts are read: a1111, comfy, compel, plain")
    emphasis: Literal["original", "no_norm", "ignore", "none"] = Field(
        "original", description="how weights in an a1111 prompt are applied"
    )
    comma_backtrack: int | None = Field(
        None, ge=0, le=75, description="tokens to look back for a comma where a chunk is full; 20 of 75 if absent"
    )
    clip_skip: int = Field(1, ge=1, le=12, description="2 leaves out the text encoder's last layer, 1 none")
    wildcards: str | None = Field(None, description="folder of wildcard files for __name__ in prompts")
    dynamic_prompts: bool | None = Field(
        None, description="whether {a|b} and __name__ are resolved; yes for a1111 and comfy if absent"
    )
    # the picture
    width: Pixels | None = Field(None, description="pixels drawn across (before the upscaler)")
    height: Pixels | None = Field(None, description="pixels drawn down (before the upscaler)")
    count: int = Field(1, ge=1, le=1000, description="number of pictures")
    batch_size: int = Field(1, ge=1, le=64, description="pictures drawn at once; faster, uses more memory")
    seamless: Literal["none", "x", "y", "both"] = Field("none", description="edges that join when the picture is tiled")
    upscaler: str | None = Field(None, description="post-step: a name, a file, or `none`")
    # noise
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="of the first picture, the next has seed + 1; random if absent"
    )
    only: int | None = Field(None, ge=0, lt=1000, description="draw this one of the `count` pictures, from 0")
    variation_seed: int | None = Field(None, ge=0, le=MAX_SEED, description="a second seed to mix in")
    variation_strength: float = Field(0.0, ge=0, le=1, description="share of the second seed's noise")
    seed_width: Pixels | None = Field(None, description="draw noise as for a picture of this width")
    seed_height: Pixels | None = Field(None, description="draw noise as for a picture of this height")
    rng: Literal["cpu", "philox", "device"] | None = Field(
        None, description="random numbers: cpu (PyTorch's), philox (CUDA's, on any device), device; cpu if absent"
    )
    eta_noise_delta: int = Field(0, ge=0, le=MAX_SEED, description="added to the seed for noise on the way (ENSD)")
    # sampling
    preset: Literal["a1111", "comfy", "diffusers"] | None = Field(
        None, description="do as this program does where programs differ"
    )
    steps: int | None = Field(None, ge=1, le=1000, description="sampling steps")
    sampler: str | None = Field(None, description="name or alias; see `reverie samplers`")
    spacing: str | None = Field(None, description="which noise levels are visited; see `reverie samplers`")
    eta: float | None = Field(None, ge=0, le=1, description="share of fresh noise, for samplers that have it")
    sampler_options: Settings = Field(default_factory=dict, description="further settings of the sampler")
    spacing_options: Settings = Field(default_factory=dict, description="settings of the spacing")
    sigmas: Annotated[tuple[float, ...] | None, BeforeValidator(_numbers)] = Field(
        None, description="noise levels to visit, instead of a spacing"
    )
    discard_penultimate: bool | None = Field(None, description="leave out the last noise level above zero")
    # guidance
    guidance_scale: float | None = Field(
        None, ge=0, le=100, description="how strongly the prompt pulls; 1 is no guidance"
    )
    guidance_rescale: float = Field(0.0, ge=0, le=1, description="share of the contrast taken back (Lin et al. 2023)")
    guidance_start: float = Field(0.0, ge=0, le=1, description="fraction of the steps before guidance begins")
    guidance_end: float = Field(1.0, ge=0, le=1, description="fraction of the steps after which guidance ends")
    guidance_curve: str = Field(
        "constant", description="guidance over the steps: constant, linear, cosine, or numbers such as 1,7,3"
    )
    guides: Annotated[tuple[Guide, ...], BeforeValidator(_several)] = Field(
        (), description="further guidance: name:setting=value,...; see `reverie guides`"
    )
    image_guidance_scale: float | None = Field(
        None, ge=0, le=100, description="how strongly the picture pulls, for instruct-pix2pix models"
    )
    # from a picture
    image: str | None = Field(None, description="picture to start from: a file or a data: URL")
    strength: float | None = Field(
        None, ge=0, le=1, description="how much of `image` is drawn over: 0 nothing, 1 all; 0.75, with a mask 1"
    )
    strength_steps: Literal["diffusers", "a1111", "a1111_fixed", "comfy"] | None = Field(
        None, description="how strength and steps go together; diffusers if absent"
    )
    resize: Literal["stretch", "crop", "fill"] = Field(
        "stretch", description="how `image` comes to the picture's size when both are given"
    )
    mask: str | None = Field(None, description="picture: white is drawn, black is kept")
    mask_invert: bool = Field(False, description="black is drawn, white is kept")
    mask_blur: float = Field(0.0, ge=0, le=256, description="softens the mask's edge on its drawn side, in pixels")
    mask_area: Literal["whole", "masked"] = Field("whole", description="draw at full size around the mask only")
    mask_padding: int = Field(32, ge=0, le=4096, description="pixels of surroundings for mask_area masked")
    mask_fill: Literal["original", "fill", "noise", "zero"] = Field(
        "original", description="what is under the mask at the start"
    )
    keep_unmasked: bool = Field(True, description="put the original pixels back outside the mask")
    extend: Extend | None = Field(None, description="outpainting")
    # more than one pass, more than one picture
    hires: Hires | None = Field(None, description="hires fix")
    tiles: Tiles | None = Field(None, description="tiled diffusion")
    travel: Travel | None = Field(None, description="frames to another prompt or seed")
    encoding: Literal["sample", "mean"] | None = Field(
        None,
        description="latents of `image`: a sample from what the VAE says (diffusers), or its mean; sample if absent",
    )
    # memory
    vae_tile: int | None = Field(
        None, ge=0, le=8192, description="decode and encode in tiles of so many pixels; 0 never, chosen if absent"
    )

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
    name = ".".join(str(part) for part in first["loc"]) or "request"
    if first["type"] == "extra_forbidden":
        import difflib

        near = difflib.get_close_matches(name, kind.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; fields are {', '.join(kind.model_fields)}"
        return f"unknown field {name!r}{hint}"
    message = first["msg"][0].lower() + first["msg"][1:]
    found = repr(first["input"])
    return f"{name} is {found if len(found) <= 80 else found[:77] + '...'}: {message}"
