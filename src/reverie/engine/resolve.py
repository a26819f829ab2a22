"""A request with every default made explicit, or refused."""

import secrets
from typing import TYPE_CHECKING, Any

from reverie.diffusion.spacing import SPACINGS
from reverie.engine.latents import check_size
from reverie.engine.plan import preset_of
from reverie.engine.request import MAX_SEED, Request
from reverie.errors import RequestError
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
    defaults = model.parts.defaults
    chosen: dict[str, Any] = {
        name: getattr(defaults, name)
        for name in ("steps", "guidance_scale", "upscaler")
        if getattr(request, name) is None
    }
    if request.image is None:  # with one, its own size counts
        chosen |= {name: getattr(defaults, name) for name in ("width", "height") if getattr(request, name) is None}
    elif request.mask_area == "masked":
        chosen |= {name: getattr(request, name) or getattr(defaults, name) for name in ("width", "height")}
    chosen |= _sampling(model, request)
    chosen["dialect"] = DIALECTS.name(request.dialect)
    if request.seed is None:
        chosen["seed"] = secrets.randbelow(2**32)
    if request.variation_strength and request.variation_seed is None:
        chosen["variation_seed"] = secrets.randbelow(2**32)
    if request.rng is None:
        chosen["rng"] = preset_of(request).rng
    if request.image is not None and request.strength is None:
        chosen["strength"] = 1.0 if request.mask or request.extend else 0.75
    if request.image is not None and request.encoding is None:
        chosen["encoding"] = "sample" if preset_of(request).timesteps == "class" else "mean"
    full = request.model_copy(update=chosen)
    _check(model, full)
    return full


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
    if full.image is None or full.mask_area == "masked":
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
    _check_variant(parts.identity.variant, full)
    _check_together(full)


def _check_variant(variant: str, full: Request) -> None:
    """Models that see more than noise and words need what they see."""
    if variant in {"depth", "x4-upscaler", "unclip"}:
        raise RequestError(f"this is a model of the kind {variant}; it opens, but drawing with it is not here yet")
    if variant in {"pix2pix", "inpaint", "refiner"} and full.image is None:
        raise RequestError(f"this is a model of the kind {variant}, which starts from a picture; give one with image")
    if variant == "inpaint" and full.mask is None and full.extend is None:
        raise RequestError("this model fills masks; give one with mask, or sides to extend")


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
    if full.hires and (full.mask or full.extend):
        raise RequestError("hires draws a whole picture over and would not keep what the mask keeps; do it in two goes")
