"""The named sets of switches that do less work (`fast`), and what a model makes of a switch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reverie.engine import tiny
from reverie.engine.request import Request
from reverie.engine.thrift import Cache, Merging
from reverie.engine.tuning import tuned
from reverie.errors import RequestError
from reverie.families.base import Parts
from reverie.nets.unet import UNet

if TYPE_CHECKING:
    from reverie.engine.bundle import Model

FEWEST = 8  # steps; between fewer of them features differ too much for a level to keep any
OF_UNETS: dict[str, Any] = {"interval": 3, "branch": 0, "schedule": "uniform"}
OF_TRANSFORMERS: dict[str, Any] = {"threshold": 0.1}


@dataclass(frozen=True)
class Level:
    """A named set of switches.

    Attributes:
        unet, transformer: fields of a request, for either kind of network.
    """

    unet: dict[str, Any]
    transformer: dict[str, Any]


LEVELS: dict[str, Level] = {
    "0": Level({}, {}),
    "1": Level({"cache": {"interval": 2}}, {"cache": {"threshold": 0.06}}),
    "2": Level({"cache": {"interval": 3}}, {"cache": {"threshold": 0.1}}),
    "3": Level(
        {"cache": {"interval": 5, "schedule": "quadratic"}, "token_merging": {"ratio": 0.5}, "decoder": "tiny"},
        {"cache": {"threshold": 0.15}, "decoder": "tiny"},
    ),
}
"""What each level of `fast` sets where the request leaves it open; `tiny` where there is one. See docs/speed.md."""


def thrifty(model: "Model", request: Request) -> Request:
    """The request with the switches that `fast` stands for, each of them explicit; `fast` itself is then None.

    Raises:
        RequestError: `auto` for a model that was not tuned on this machine, or a switch that this model cannot use.
    """
    wanted = _meant(model, request)
    chosen: dict[str, Any] = {"fast": None}
    for name, kind in (("cache", Cache), ("token_merging", Merging)):
        if getattr(request, name) is None and name in wanted:
            chosen[name] = kind(**wanted[name])
    if "guidance_end" in wanted and "guidance_end" not in request.model_fields_set:
        chosen["guidance_end"] = max(wanted["guidance_end"], request.guidance_start)
    if "decoder" in wanted and "decoder" not in request.model_fields_set and tiny.found(model):
        chosen["decoder"] = wanted["decoder"]
    full = request.model_copy(update=chosen)
    if full.decoder != "full":
        tiny.path_of(model, full.decoder)  # or it is refused now
    if full.cache is not None:
        full = full.model_copy(update={"cache": _explicit(model.parts, full.cache)})
    if full.token_merging is not None:
        _check_merging(model.parts, full.token_merging)
    return full


def _meant(model: "Model", request: Request) -> dict[str, Any]:
    """The fields that a level stands for."""
    if request.fast == "auto":
        return tuned(model)
    level = LEVELS[request.fast or "0"]
    fields = level.transformer if model.parts.network == "transformer" else level.unet
    few = (request.steps or model.parts.defaults.steps) < FEWEST
    return {name: value for name, value in fields.items() if not (few and name == "cache")}


def _explicit(parts: Parts, cache: Cache) -> Cache:
    """Every setting that the model's network has."""
    transformer = parts.network == "transformer"
    own, others = (OF_TRANSFORMERS, OF_UNETS) if transformer else (OF_UNETS, OF_TRANSFORMERS)
    for name in others:
        if getattr(cache, name) is not None:
            kind = "a diffusion transformer" if transformer else "a U-Net"
            raise RequestError(f"cache.{name} is not for this model, which has {kind}; its settings: {', '.join(own)}")
    full = cache.model_copy(update={name: value for name, value in own.items() if getattr(cache, name) is None})
    if isinstance(parts.unet, UNet) and (full.branch or 0) > (last := parts.unet.maps - 2):
        raise RequestError(f"cache.branch is {full.branch}; the last map that this model can begin at is {last}")
    return full


def _check_merging(parts: Parts, merging: Merging) -> None:
    if not merging.ratio:
        return
    if parts.network == "transformer":
        raise RequestError("token_merging is for U-Nets; this model is a diffusion transformer, leave it out")
    most = 1 - 1 / merging.stride**2
    if merging.ratio > most:
        raise RequestError(
            f"token_merging.ratio is {merging.ratio:g}; one token of {merging.stride**2} is kept, so that {most:g} is "
            "the most: take a smaller ratio or a larger stride"
        )
