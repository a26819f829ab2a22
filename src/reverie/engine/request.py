"""The request: every field that decides a picture. Flags, metadata and documentation are derived from it."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from reverie.engine.extras import Control, ImagePrompt, Lora
from reverie.engine.fields import Fields, Pixels, Settings, Written
from reverie.engine.thrift import Cache, Fast, Merging
from reverie.errors import RequestError, unfit, unknown

MAX_SEED = 2**63 - 1
HANDED_OVER = 0.8  # share of the noise schedule: SDXL's refiner knows the last 200 of 1000 timesteps


class Guide(Written):
    """One named guidance wrapper (see `reverie guides`) and its settings. Written `pag:scale=3,layers=mid+up.0`."""

    name: str = Field(description="name of the wrapper")
    options: Settings = Field(default_factory=dict, description="its settings")

    @classmethod
    def of_text(cls, text: str) -> dict[str, Any]:
        """See `Written`."""
        name, _, options = text.partition(":")
        return {"name": name.strip(), "options": options}


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str | dict | Fields) else value


def _numbers(value: Any) -> Any:
    return tuple(part for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _level(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _pair(value: Any) -> Any:
    """`"1024x768"` -> `("1024", "768")`; anything else is left to pydantic."""
    if not isinstance(value, str):
        return value
    parts = value.lower().replace(",", "x").split("x")
    if len(parts) != 2:
        raise ValueError("expected two numbers of pixels, as in 1024x768")
    return tuple(part.strip() for part in parts)


Coordinate = Annotated[int, Field(ge=0, le=65536)]
Pair = Annotated[tuple[Coordinate, Coordinate] | None, BeforeValidator(_pair)]


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


class Micro(Fields):
    """What SDXL is told of a picture's sizes, in pixels across and down (diffusers takes them down and across)."""

    original_size: Pair = Field(None, description="WIDTHxHEIGHT before scaling; a small one draws blurred")
    crop: Pair = Field(None, description="LEFTxTOP, what was cut off; 0x0, nothing, if absent")
    target_size: Pair = Field(None, description="WIDTHxHEIGHT after scaling and cutting")
    aesthetic_score: float | None = Field(None, ge=0, le=10, description="told to the refiner; 6 if absent")
    negative_original_size: Pair = Field(None, description="the same for the negative prompt")
    negative_crop: Pair = Field(None, description="the same for the negative prompt")
    negative_target_size: Pair = Field(None, description="the same for the negative prompt")
    negative_aesthetic_score: float | None = Field(
        None, ge=0, le=10, description="the same for the negative prompt; 2.5 if absent"
    )


class Refine(Fields):
    """A second model of the same latents that takes over: before the noise is gone, or once the picture is drawn."""

    model: str = Field(description="its file or folder, its name or the digits of its hash")
    at: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the noise schedule after which it goes on with the sample; 0.8 if absent",
    )
    strength: float | None = Field(
        None, gt=0, le=1, description="instead of `at`: how much of the finished picture it draws over"
    )
    steps: int | None = Field(None, ge=1, le=1000, description="with `strength`: its steps; as before if absent")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="its guidance scale; as before if absent")


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
    depth: str | None = Field(
        None, description="picture of the depth, near is white: a file or a data: URL; for models that are shown depth"
    )
    noise_level: int | None = Field(
        None, ge=0, le=999, description="noise on the picture that an upscaler (20) or an unCLIP model (0) is shown"
    )
    # adapters
    loras: Annotated[tuple[Lora, ...], BeforeValidator(_several)] = Field(
        (), description="FILE:0.8, LoRAs and their kin; a prompt may name them, too: <lora:name:0.8>"
    )
    embeddings: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(
        (), description="textual inversions: FILE, called by its name in prompts, or WORD=FILE"
    )
    controls: Annotated[tuple[Control, ...], BeforeValidator(_several)] = Field(
        (), description="ControlNets and T2I-Adapters: canny:PICTURE:1.0:0:0.8, kind, picture, strength, start, end"
    )
    image_prompts: Annotated[tuple[ImagePrompt, ...], BeforeValidator(_several)] = Field(
        (), description="pictures that say what to draw (IP-Adapter): PICTURE:0.6:adapter=FILE"
    )
    # more than one pass, more than one picture
    sizes: Micro | None = Field(None, description="sizes told to SDXL")
    hires: Hires | None = Field(None, description="hires fix")
    refine: Refine | None = Field(None, description="refiner")
    tiles: Tiles | None = Field(None, description="tiled diffusion")
    travel: Travel | None = Field(None, description="frames to another prompt or seed")
    encoding: Literal["sample", "mean"] | None = Field(
        None,
        description="latents of `image`: a sample from what the VAE says (diffusers), or its mean; sample if absent",
    )
    # less work than the exact picture needs; see docs/speed.md
    fast: Annotated[Fast | None, BeforeValidator(_level)] = Field(
        None, description="sets of the switches below: 0 none, to 3 the most; auto as `reverie tune` found; 0 if absent"
    )
    cache: Cache | None = Field(None, description="feature caching")
    token_merging: Merging | None = Field(None, description="token merging")
    decoder: str = Field(
        "full", description="what decodes latents: full, the model's own; tiny, TAESD from the library; or its file"
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
    if first["type"] == "extra_forbidden":
        *groups, name = first["loc"]
        return unknown("field", str(name), _within(kind, groups).model_fields, [str(group) for group in groups])
    return unfit(".".join(map(str, first["loc"])) or "request", first["input"], first["msg"])


def _within(kind: type[BaseModel], groups: Sequence[int | str]) -> type[BaseModel]:
    """The group of fields that stands at a place in a model: `["loras", 0]` -> `Lora`."""
    for name in groups:
        if isinstance(name, str) and name in kind.model_fields:
            kind = next(_groups(kind.model_fields[name].annotation), kind)
    return kind


def _groups(annotation: Any) -> Iterator[type[BaseModel]]:
    """The groups of fields that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _groups(inner)
