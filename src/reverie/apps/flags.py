"""The command line's flags, derived from the fields of `Request`: a flag is its field with dashes."""

import inspect
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from reverie.engine.fields import Fields
from reverie.engine.request import Request

SIMPLE = (int, float, str, bool)


def parameters(left_out: tuple[str, ...] = ("prompt",)) -> list[inspect.Parameter]:
    """One keyword parameter, annotated for typer, for every field and every field of a group (`--hires-scale`)."""
    found = []
    for name, info in Request.model_fields.items():
        if name in left_out:
            continue
        group = _group(info)
        if group is None:
            found.append(_parameter(name, _flag_type(info), _help(info), once=_repeated(info)))
            continue
        found.append(_parameter(name, bool, f"{info.description}, with its defaults"))
        for inner, inner_info in group.model_fields.items():
            help_ = f"{info.description}: {_help(inner_info)}"
            found.append(_parameter(f"{name}_{inner}", _flag_type(inner_info), help_))
    return found


def fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flags that were given -> fields of a request, which it checks itself."""
    given = {name: value for name, value in values.items() if value not in (None, [])}
    found: dict[str, Any] = {}
    for name, info in Request.model_fields.items():
        group = _group(info)
        if group is not None:
            inner = {k: given[f"{name}_{k}"] for k in group.model_fields if f"{name}_{k}" in given}
            if inner or given.get(name):
                found[name] = inner
        elif name in given:
            found[name] = given[name]
    return found


def _group(info: FieldInfo) -> type[Fields] | None:
    kind = _bare(info.annotation)
    return kind if isinstance(kind, type) and issubclass(kind, Fields) else None


def _bare(annotation: Any) -> Any:
    """Without `| None` and without metadata."""
    if get_origin(annotation) in {Union, UnionType}:
        return _bare(next(a for a in get_args(annotation) if a is not type(None)))
    return _bare(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _flag_type(info: FieldInfo) -> Any:
    kind = _bare(info.annotation)
    if get_origin(kind) is dict or _repeated(info):
        return list[str]
    return kind if kind in SIMPLE else str


def _repeated(info: FieldInfo) -> bool:
    """Whether the field has several values, one a flag: groups in their written form, or texts."""
    kind = _bare(info.annotation)
    inner = get_args(kind)[0] if get_origin(kind) is tuple else None
    return inner is str or (isinstance(inner, type) and issubclass(inner, Fields))


def _help(info: FieldInfo) -> str:
    kind = _bare(info.annotation)
    choices = f" ({', '.join(get_args(kind))})" if get_origin(kind) is Literal else ""
    default = info.get_default(call_default_factory=True)
    shown = "" if default in (None, "", (), {}) else f" [default: {default}]"
    return f"{info.description}{choices}{shown}"


def _parameter(name: str, kind: Any, help_: str, *, once: bool = False) -> inspect.Parameter:
    """A flag; one that is given `once` for each value is singular, too (`--lora a --lora b`)."""
    plain = f"--{name.replace('_', '-')}"
    names = (plain.removesuffix("s"), plain) if once else ()
    option = typer.Option(*names, help=help_)
    annotation = Annotated.__class_getitem__((kind | None, option))  # type: ignore[attr-defined]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
