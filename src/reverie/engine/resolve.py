"""A request with every default made explicit, or refused."""

import secrets
from typing import TYPE_CHECKING, Any

from reverie.diffusion.process import FlowProcess
from reverie.diffusion.spacing import SPACINGS
from reverie.engine.equipment import hinted
from reverie.engine.latents import check_size
from reverie.engine.levels import thrifty
from reverie.engine.plan import preset_of
from reverie.engine.request import MAX_SEED, Request
from reverie.engine.showing import SHOWN
from reverie.engine.sources import read_picture
from reverie.errors import RequestError
from reverie.families.base import Parts
from reverie.sampling.names import label_options
from reverie.sampling.names import resolve as named
from reverie.sampling.presets import chosen_spacing
from reverie.text.prompt import DIALECTS

if TYPE_CHECKING:
    from reverie.engine.bundle import Model


def resolve(model: "Model", request: Request) -> Request:
    """Fill every None from the model's defaults or the preset, and names by their canonical form.

    Raises:
        RequestError: an unknown sampler or spacing, a size the network cannot draw, fields that do not go together.
    """
    request = thrifty(model, hinted(model, request))
    defaults, over = model.parts.defaults, draws_over(model, request)
    chosen: dict[str, Any] = {
        name: getattr(defaults, name)
        for name in ("steps", "guidance_scale", "upscaler")
        if getattr(request, name) is None
    }
    if model.parts.identity.variant == "x4-upscaler" and request.image is not None:
        chosen |= _enlarged(model, request)
    elif not over:  # with a picture, its own size counts
        chosen |= {name: getattr(defaults, name) for name in ("width", "height") if getattr(request, name) is None}
    elif request.mask_area == "masked":
        chosen |= {name: getattr(request, name) or getattr(defaults, name) for name in ("width", "height")}
    if request.guidance_scale is not None and request.guidance_scale < 1 and _unguided(model, request):
        chosen["guidance_scale"] = 1.0
    chosen |= _sampling(model, request)
    chosen["dialect"] = DIALECTS.name(request.dialect)
    if request.seed is None:
        chosen["seed"] = secrets.randbelow(2**32)
    if request.variation_strength and request.variation_seed is None:
        chosen["variation_seed"] = secrets.randbelow(2**32)
    if request.rng is None:
        chosen["rng"] = preset_of(request).rng
    if model.parts.augmentation is not None and request.noise_level is None:
        chosen["noise_level"] = model.parts.augmentation.level
    if over and request.strength is None:
        chosen["strength"] = 1.0 if request.mask or request.extend else 0.75
    if over and request.encoding is None:
        chosen["encoding"] = "sample" if preset_of(request).timesteps == "class" else "mean"
    full = request.model_copy(update=chosen)
    _check(model, full)
    return full


def _unguided(model: "Model", request: Request) -> bool:
    """Whether a scale of 0 means no guidance, as in diffusers and on the cards of distilled models.

    Elsewhere it means the negative prompt alone, as the formula says.
    """
    return model.parts.defaults.guidance_scale == 1 or preset_of(request).name == "diffusers"


def draws_over(model: "Model", request: Request) -> bool:
    """Whether the picture that is given is drawn over; some models are shown it instead."""
    return request.image is not None and model.parts.identity.variant not in SHOWN


def _enlarged(model: "Model", request: Request) -> dict[str, Any]:
    """Width and height of what an upscaler draws: as many pixels for each of the picture's as its latents have."""
    factor = model.parts.vae.config.factor
    width, height = read_picture(str(request.image)).size
    return {"width": request.width or width * factor, "height": request.height or height * factor}


def _sampling(model: "Model", request: Request) -> dict[str, Any]:
    """Sampler and spacing, by any of their public names."""
    defaults = model.parts.defaults
    sampler, spacing = named(request.sampler) if request.sampler else (defaults.sampler, None)
    if request.spacing is not None:
        spacing = SPACINGS.name(request.spacing)
    chosen: dict[str, Any] = {"sampler": sampler, "spacing": spacing or defaults.spacing}
    if request.sampler and (meant := label_options(request.sampler)):
        chosen["sampler_options"] = {**meant, **request.sampler_options}
    if request.preset is not None:
        preset = preset_of(request)
        chosen |= {"spacing": chosen_spacing(preset, sampler, spacing), "preset": preset.name}
    return chosen


def _check(model: "Model", full: Request) -> None:
    parts = model.parts
    last = max(full.seed or 0, full.variation_seed or 0) + full.count - 1
    if last > MAX_SEED:
        raise RequestError(f"seed {full.seed} with count {full.count} goes beyond {MAX_SEED}, the largest seed")
    if not draws_over(model, full) or full.mask_area == "masked":
        check_size(parts, full.width or 0, full.height or 0)
    else:
        for name in ("width", "height"):
            if (side := getattr(full, name)) is not None:
                check_size(parts, **{"width": parts.vae.config.factor, "height": parts.vae.config.factor, name: side})
    if full.clip_skip > parts.text_encoder.config.layers:
        layers = parts.text_encoder.config.layers
        raise RequestError(f"clip_skip is {full.clip_skip}; the text encoder has {layers} layers")
    if full.only is not None and full.only >= full.count:
        raise RequestError(f"only is {full.only}, but count is {full.count}; pictures are counted from 0")
    if (full.seed_width is None) != (full.seed_height is None):
        raise RequestError("seed_width and seed_height go together; give both")
    if full.guidance_start > full.guidance_end:
        raise RequestError(f"guidance starts at {full.guidance_start:g} and ends before, at {full.guidance_end:g}")
    _check_variant(parts, full)
    _check_together(full)
    told = [parts]
    if full.refine is not None:
        other = model.successor(full.refine.model).parts
        _check_refiner(parts, other, full)
        told.append(other)
    _check_sizes(told, full)


def _check_variant(parts: Parts, full: Request) -> None:
    """Models that see more than noise and words need what they see."""
    variant, kind = parts.identity.variant, f"this is a model of the kind {parts.identity.variant}"
    if variant in {"pix2pix", "inpaint", "refiner"} and full.image is None:
        raise RequestError(f"{kind}, which starts from a picture; give one with image")
    if variant == "unclip" and parts.image_encoder is None:
        raise RequestError(f"{kind}, but the image encoder that it draws after is not in the file; use the whole model")
    if variant in SHOWN and full.image is None:
        raise RequestError(f"{kind}, which is shown a picture; give one with image")
    if variant == "inpaint" and full.mask is None and full.extend is None:
        raise RequestError("this model fills masks; give one with mask, or sides to extend")
    if variant == "depth" and full.depth is None:
        raise RequestError(
            f"{kind}, which is shown how far away things are; give a picture of that with depth (near is white): "
            "it is not estimated from image; `reverie control depth` makes one"
        )
    if full.depth is not None and variant != "depth" and full.refine is None:
        raise RequestError("this model is shown no depth; leave depth out")
    for name in ("strength", "mask", "extend", "encoding"):
        if variant in SHOWN and getattr(full, name) is not None:
            raise RequestError(f"{kind}, which is shown the picture and does not draw it over; leave {name} out")
    if full.hires and variant in {"pix2pix", "x4-upscaler"}:
        raise RequestError(f"{kind}, which is shown the picture at one size; leave hires out")
    most = 0 if parts.augmentation is None else parts.augmentation.most
    if full.noise_level is not None and (parts.augmentation is None or full.noise_level > most):
        known = f"it knows levels up to {most}" if parts.augmentation else "it is shown no picture under noise"
        raise RequestError(f"noise_level is {full.noise_level}, but of this model {known}")


def _check_refiner(first: Parts, second: Parts, full: Request) -> None:
    """Whether one model can go on with what the other has begun."""
    refine = full.refine
    assert refine is not None
    if refine.strength is not None and refine.at is not None:
        raise RequestError("refine takes over at a place, or draws the finished picture over; give at or strength")
    if refine.strength is None and refine.steps is not None:
        raise RequestError(
            "refine.steps goes with refine.strength; at a place the refiner does the steps that are left"
        )
    for who, parts, known in (("model", first, {"", "refiner", "depth", "unclip"}),
                              ("refiner", second, {"", "refiner", "depth"})):  # fmt: skip
        if parts.identity.variant not in known:
            raise RequestError(f"the {who} is of the kind {parts.identity.variant}, which no other model goes on with")
    shown_depth = "depth" in {first.identity.variant, second.identity.variant}
    if shown_depth != (full.depth is not None):
        wanted = "the refiner is shown depth; give" if shown_depth else "neither model is shown depth; leave out"
        raise RequestError(f"{wanted} depth")
    if _latents(first) != _latents(second):
        raise RequestError(
            f"the refiner ({second.identity.family}) has other latents than the model ({first.identity.family}); "
            "it must be of the same family"
        )


def _latents(parts: Parts) -> tuple[object, ...]:
    """What two models must have in common for one to go on with the other's latents."""
    c = parts.vae.config
    scale = (c.scaling_factor, c.shift_factor, c.latents_mean, c.latents_std)
    return c.latent_channels, c.factor, *scale, isinstance(parts.process, FlowProcess)


def _check_sizes(told: list[Parts], full: Request) -> None:
    """Sizes that no model is told are refused."""
    given = {} if full.sizes is None else full.sizes.model_dump(exclude_none=True)
    known = {name for parts in told for name in parts.sizes}
    for name in given:
        if name.removeprefix("negative_") not in known:
            which = f"it is told {', '.join(sorted(known))}" if known else "SDXL is told sizes, this model is not"
            raise RequestError(f"sizes.{name} is not told to this model: {which}")


def _check_together(full: Request) -> None:
    """Fields that do not go together: said, not ignored."""
    for one, other in (("travel", "hires"), ("travel", "variation_strength"), ("travel", "only")):
        if getattr(full, one) and getattr(full, other) not in (None, 0.0):
            raise RequestError(f"{one} and {other} do not go together; leave one out")
    if full.travel and full.count > 1:
        raise RequestError(f"travel draws frames of one picture; count is {full.count}, leave it out")
    if full.sigmas is not None and full.image is not None and (full.strength or 0) < 1 and not full.mask:
        raise RequestError("sigmas say where to begin, and so does strength; give strength 1 or no sigmas")
    if full.tiles and full.tiles.overlap >= full.tiles.size:
        raise RequestError(
            f"tiles of {full.tiles.size} cannot overlap by {full.tiles.overlap}; make the overlap smaller"
        )
    if full.depth and full.extend:
        raise RequestError("depth is of the picture, and extend adds to it; extend the picture first")
    if full.depth and full.resize != "stretch":
        raise RequestError(f"resize {full.resize} would move the picture against its depth; leave resize out")
    if full.hires and (full.mask or full.extend):
        raise RequestError("hires draws a whole picture over and would not keep what the mask keeps; do it in two goes")
