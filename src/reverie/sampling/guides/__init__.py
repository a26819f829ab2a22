"""The table of guides. A guide is one function in one file, found because it is registered here.

A guide's function is `(previous, context, **settings) -> Guidance`. Its settings are its keyword arguments: type, range
and description are read from their annotations, so that a request is checked and `reverie guides` is printed from them.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import Tensor
from torch.nn import functional

from reverie.diffusion.process import AnyProcess
from reverie.errors import RequestError, unfit, unknown
from reverie.registry import Registry
from reverie.sampling.guidance import Answers, Guidance, Guide, Role, Weight
from reverie.sampling.tapping import Layout
from reverie.types import Taps

Layers = Annotated[str, Field(description="layers, joined by +: mid, down.1, up.0.2, mid.0.attn1, or full paths")]
Start = Annotated[float, Field(ge=0, le=1, description="fraction of the steps before it begins")]
End = Annotated[float, Field(ge=0, le=1, description="fraction of the steps after which it ends")]

Maker = Callable[..., Guidance]


@dataclass(frozen=True)
class Context:
    """What guides may know about the model.

    Attributes:
        layout: where its network can be tapped.
        process: how noise enters.
    """

    layout: Layout
    process: AnyProcess


@dataclass(frozen=True)
class Setting:
    """One setting of a guide, as it is listed.

    Attributes:
        low, high: the least and the greatest value, None where there is no such bound.
        choices: the values, where there are only so many.
    """

    name: str
    default: Any
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class GuideEntry:
    """A guide and what one needs to know to use it.

    Attributes:
        make: `(previous, context, **settings) -> Guidance`.
        source: paper and equation.
        summary: one line for lists.
        options: the model that settings are checked by.
    """

    name: str
    make: Maker
    source: str
    summary: str
    options: type[BaseModel]

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Its settings in the order of the function."""
        return tuple(_setting(name, self.options) for name in self.options.model_fields)

    def checked(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """All settings, the given ones as numbers or words of the right kind.

        Raises:
            RequestError: one line for the first that is unknown or out of range.
        """
        try:
            return dict(self.options(**settings))
        except ValidationError as error:
            raise RequestError(_complaint(error, list(self.options.model_fields))) from None


GUIDES = Registry[GuideEntry]("guide")


def guide(name: str, *aliases: str, source: str) -> Callable[[Maker], Maker]:
    """Register a function as the guide `name`; the first line of its docstring is the summary."""

    def register(function: Maker) -> Maker:
        hints = get_type_hints(function, include_extras=True)
        keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        fields: dict[str, Any] = {p.name: (hints[p.name], p.default) for p in keywords}
        config = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)
        options = create_model(name, __config__=config, **fields)
        summary = (inspect.getdoc(function) or "").split("\n")[0]
        GUIDES.add(name, GuideEntry(name, function, source, summary, options), aliases)
        return function

    return register


def load_all() -> Registry[GuideEntry]:
    """The full table: imports every file of this folder."""
    for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        import_module(f"{__name__}.{file.stem}")
    return GUIDES


def build(wanted: Iterable[tuple[str, Mapping[str, Any]]], context: Context, weight: Weight) -> Guidance:
    """Classifier-free guidance with the guides of a request around it, each around those before it.

    Args:
        wanted: names and settings, the innermost first.

    Raises:
        RequestError: an unknown guide, setting or layer, or a value out of range.
    """
    table = load_all()
    guidance = Guidance(weight=weight)
    for name, settings in wanted:
        entry = table[name]
        try:
            guidance = entry.make(guidance, context, **entry.checked(settings))
        except RequestError as error:
            raise RequestError(f"guide {entry.name}: {error}") from None
    return guidance


def listing() -> list[dict[str, Any]]:
    """Every guide with its aliases, source and settings, as plain data for `reverie guides`."""
    table = load_all()
    return [
        {
            "name": name, "summary": table[name].summary, "source": table[name].source, "aliases": table.aliases(name),
            "settings": [asdict(setting) for setting in table[name].settings],
        }
        for name in sorted(table)
    ]  # fmt: skip


def around(previous: Guidance, outer: Guide, *needs: Role) -> Guidance:
    """`previous` with another guide, which calls the one in it, and the answers that this one needs."""
    return replace(previous, guide=outer, needs=previous.needs | set(needs))


def along(x: Tensor, direction: Tensor) -> Tensor:
    """The part of `x` parallel to `direction`, picture by picture; both `(B, C, h, w)`."""
    axes = tuple(range(1, x.ndim))
    unit = functional.normalize(direction, dim=axes)  # type: ignore[arg-type]  # it takes several axes too
    return (x * unit).sum(axes, keepdim=True) * unit


def away_from(
    previous: Guidance,
    taps: Callable[[Answers], Taps],
    scale: float | Callable[[float], float],
    start: float,
    end: float,
) -> Guidance:
    """Push x0 away from what the network says with `taps`: `x0 + scale * (positive - tapped positive)`.

    Args:
        scale: a number, or a function of sigma.
    """

    def pushed(answers: Answers) -> Tensor:
        x0 = previous.guide(answers)
        strength = scale(answers.sigma) if callable(scale) else scale
        if strength == 0 or not answers.within(start, end):
            return x0
        return x0 + strength * answers.perturbed(taps(answers), pushed)

    return around(previous, pushed)


def _setting(name: str, options: type[BaseModel]) -> Setting:
    field = options.model_fields[name]
    schema = options.model_json_schema()["properties"][name]
    schema = next((s for s in schema.get("anyOf", ()) if s.get("type") != "null"), schema)
    return Setting(
        name, field.default, field.description or "", schema.get("minimum", schema.get("exclusiveMinimum")),
        schema.get("maximum"), tuple(schema.get("enum", ())),
    )  # fmt: skip


def _complaint(error: ValidationError, known: list[str]) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return unknown("setting", name, known)
    return unfit(name, first["input"], first["msg"])
