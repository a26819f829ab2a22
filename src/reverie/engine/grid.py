"""X/Y/Z grids: one picture for every combination of values of up to three fields, on one labelled sheet."""

import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from reverie.engine.fields import Fields
from reverie.engine.request import Request
from reverie.errors import RequestError

MOST_CELLS = 1000
MARGIN = 12  # pixels between pictures and around labels
REPLACE = "prompt_sr"  # AUTOMATIC1111's "Prompt S/R": search the first value, replace it by each


@dataclass(frozen=True)
class Axis:
    """One direction of a grid.

    Attributes:
        field: a field of the request, `group.field` for one of a group, or `prompt_sr`.
        values: as they were written.
    """

    field: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Axis":
        """`steps=10,20,30`, `seed=1..4`, `steps=10..50:20`, `sampler=euler,"dpmpp_2m"`.

        Raises:
            RequestError: no `=`, no values, no such field, a range that is none or too long.
        """
        field, equals, written = text.partition("=")
        field = field.strip().replace("-", "_")
        if not equals or not written.strip():
            raise RequestError(f"axis {text!r}: expected field=value,value,...")
        _check_field(field)
        parts = next(csv.reader([written], skipinitialspace=True))
        values = tuple(v for part in parts for v in _expanded(part.strip()))
        return cls(field, values)

    def applied(self, fields: dict[str, Any], value: str) -> dict[str, Any]:
        """`fields` with this axis at `value`."""
        if self.field == REPLACE:
            return {**fields, "prompt": str(fields.get("prompt", "")).replace(self.values[0], value)}
        group, dot, name = self.field.partition(".")
        if not dot:
            return {**fields, group: _parsed(self.field, value)}
        return {**fields, group: {**(fields.get(group) or {}), name: _parsed(self.field, value)}}


@dataclass(frozen=True)
class Cell:
    """One picture of a grid: its place along x, y and z, and what draws it."""

    place: tuple[int, int, int]
    request: Request


def cells(base: dict[str, Any], axes: Sequence[Axis]) -> list[Cell]:
    """Every combination, x fastest. All requests are checked here, before anything is drawn.

    Args:
        base: the fields that all pictures share.
        axes: one to three.

    Raises:
        RequestError: too many pictures, a field twice, a value that its field refuses, a search text not in the prompt.
    """
    if not 1 <= len(axes) <= 3:
        raise RequestError(f"a grid has 1 to 3 axes, not {len(axes)}")
    names = [axis.field for axis in axes]
    if len(set(names)) < len(names):
        raise RequestError(f"axes {', '.join(names)}: a field can be one axis only")
    _check_search(base, axes)
    x, y, z = (*axes, *[Axis("", ("",))] * (3 - len(axes)))
    if (number := len(x.values) * len(y.values) * len(z.values)) > MOST_CELLS:
        raise RequestError(f"the grid has {number} pictures; at most {MOST_CELLS}")
    found = []
    for place in itertools.product(*(range(len(axis.values)) for axis in (z, y, x))):
        fields = dict(base)
        for axis, index in zip((z, y, x), place, strict=True):
            fields = axis.applied(fields, axis.values[index]) if axis.field else fields
        found.append(Cell((place[2], place[1], place[0]), Request.of(**fields)))
    return found


def sheet(pictures: dict[tuple[int, int, int], Image.Image], axes: Sequence[Axis]) -> Image.Image:
    """All pictures with their labels on one white sheet; a z axis stacks one x/y grid under another."""
    x, y, z = (*axes, *[Axis("", ("",))] * (3 - len(axes)))
    width = max(p.width for p in pictures.values())
    height = max(p.height for p in pictures.values())
    font = _font(max(min(width // 14, 28), 13))
    line = font.size * 1.35
    left = _label_width(y, font) + MARGIN
    tops = [label_lines(_label(x, v), width, font) for v in x.values]
    head = int(max(map(len, tops)) * line) + MARGIN
    title = int(line) + MARGIN if z.field else 0
    page = title + head + len(y.values) * (height + MARGIN)
    image = Image.new("RGB", (left + len(x.values) * (width + MARGIN), len(z.values) * page), "white")
    draw = ImageDraw.Draw(image)
    for k, value in enumerate(z.values):
        if z.field:
            draw.text((left, k * page + MARGIN // 2), _label(z, value), "black", font)
        for i, lines in enumerate(tops):
            centre = left + i * (width + MARGIN) + width / 2
            draw.multiline_text((centre, k * page + title + head / 2), "\n".join(lines), "black", font, "mm",
                                align="center")  # fmt: skip
        for j, label in enumerate(y.values):
            down = k * page + title + head + j * (height + MARGIN)
            if y.field:
                lines = label_lines(_label(y, label), left - 2 * MARGIN, font)
                draw.multiline_text((left - MARGIN, down + height / 2), "\n".join(lines), "black", font, "rm",
                                    align="right")  # fmt: skip
            for i in range(len(x.values)):
                if (i, j, k) in pictures:
                    image.paste(pictures[i, j, k], (left + i * (width + MARGIN), down))
    return image


def captioned(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 6, ground: str = "white"
) -> Image.Image:
    """Pictures of one size in rows, each over its caption, on one sheet of a colour."""
    width, height = pictures[0].size
    font = _font(max(min(width // 14, 28), 13))
    texts = [label_lines(caption, width, font) for caption in captions]
    cell = (width + MARGIN, height + MARGIN + int(max(map(len, texts)) * font.size * 1.35))
    columns, rows = min(columns, len(pictures)), -(-len(pictures) // columns)
    image = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), ground)
    draw = ImageDraw.Draw(image)
    for i, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        left, top = MARGIN + i % columns * cell[0], MARGIN + i // columns * cell[1]
        image.paste(picture, (left, top))
        draw.multiline_text((left + width / 2, top + height + 4), "\n".join(lines), "black", font, "ma", align="center")
    return image


def label_lines(text: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """`text` in lines that fit `width`; a word that is too long is cut off with an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(_cut(word, width, font))
    return lines or [""]


def _check_field(field: str) -> None:
    group, dot, name = field.partition(".")
    info = Request.model_fields.get(group)
    if field == REPLACE or (info and not dot and group != "count"):
        return
    kinds = [k for k in getattr(info.annotation, "__args__", ()) if isinstance(k, type)] if info else []
    if any(issubclass(k, Fields) and name in k.model_fields for k in kinds):
        return
    import difflib

    near = difflib.get_close_matches(field, [*Request.model_fields, REPLACE], n=1)
    raise RequestError(
        f"axis field {field!r} is not a field of a request" + (f"; did you mean {near[0]}?" * bool(near))
    )


def _check_search(base: dict[str, Any], axes: Sequence[Axis]) -> None:
    for axis in axes:
        if axis.field == REPLACE and axis.values[0] not in str(base.get("prompt", "")):
            raise RequestError(f"axis {REPLACE}: {axis.values[0]!r}, the first value, is not in the prompt")


def _expanded(value: str) -> list[str]:
    """`1..4` -> 1, 2, 3, 4; `10..50:20` -> 10, 30, 50; anything else is itself."""
    low, dots, rest = value.partition("..")
    high, _, step = rest.partition(":")
    try:
        first, last, by = float(low), float(high), float(step or 1)
    except ValueError:
        return [value]
    if not dots or by <= 0 or last < first or (last - first) / by >= MOST_CELLS:
        raise RequestError(f"range {value!r}: expected low..high or low..high:step, rising, of at most {MOST_CELLS}")
    count = int((last - first) / by + 1e-9) + 1
    return [f"{first + i * by:.10g}" for i in range(count)]


def _parsed(field: str, value: str) -> str | None:
    """`none` leaves a field to the model, except where it is a value of its own."""
    return None if value.lower() == "none" and field not in {"upscaler", "emphasis", "seamless"} else value


def _label(axis: Axis, value: str) -> str:
    return value if axis.field == REPLACE else f"{axis.field} {value}"


def _label_width(axis: Axis, font: ImageFont.FreeTypeFont) -> int:
    if not axis.field:
        return 0
    longest = max(font.getlength(word) for value in axis.values for word in _label(axis, value).split())
    whole = max(font.getlength(_label(axis, value)) for value in axis.values)
    return int(min(max(longest, min(whole, 160)), 320)) + MARGIN


def _cut(word: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(word) <= width:
        return word
    while word and font.getlength(f"{word}…") > width:
        word = word[:-1]
    return f"{word}…"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which is everywhere."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
