r"""The dialect of AUTOMATIC1111's web UI, Forge, SD.Next, stable-diffusion.cpp: networks, AND, schedules, emphasis.

They are read in that order, each within what the one before left. Lines that begin with `#` are not stripped: to the
web UI that is an option, and a `#` is text to everyone else.
"""

import re
from itertools import pairwise

from reverie.errors import RequestError
from reverie.text import schedule
from reverie.text.emphasis import emphasised, show_sections
from reverie.text.networks import extracted, show_network
from reverie.text.pieces import (
    REAL,
    SANE,
    Blend,
    Part,
    Piece,
    Prompt,
    Reading,
    Section,
    Stage,
    Stages,
    bounded,
    limited,
    number,
    unusual,
)

_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(rf":\s*+([+-]?{REAL})")


def parse(text: str, reading: Reading) -> Prompt:
    """Read a prompt. Never fails; what cannot have been meant is in the warnings."""
    text, networks, warnings = extracted(text)
    texts = _AND.split(text)
    lone = len(texts) == 1
    parts = []
    for whole in texts:
        own, weight = (whole.strip(), 1.0) if lone and reading.negative else weighted(whole)
        if abs(weight) > SANE or (lone and weight != 1):
            what = "whole prompt" if lone else "part of the prompt"
            warnings.append(f"the {what} has weight {weight:g}, for it ends in `:{weight:g}`; write `\\:` for a colon")
        parts.append(_part(own, weight, reading, warnings))
    return Prompt("a1111", tuple(parts), networks, warnings=limited(warnings))


def weighted(text: str) -> tuple[str, float]:
    r"""Cut the weight from the end of a part: `a cat :1.2 ` is `("a cat", 1.2)`. A `\:` is a colon."""
    text = text.strip()
    colon = text.rfind(":")
    match = _WEIGHT.fullmatch(text, colon) if colon >= 0 and not _escaped(text, colon) else None
    return (text[:colon].rstrip(), bounded(float(match.group(1)))) if match else (text, 1.0)


def _escaped(text: str, at: int) -> bool:
    """Whether an odd number of backslashes stands before a character."""
    return (at - len(text[:at].rstrip("\\"))) % 2 == 1


def _part(text: str, weight: float, reading: Reading, warnings: list[str]) -> Part:
    """Read one of the parts between the ANDs."""
    nodes, found = schedule.scheduled(text)
    warnings += found + schedule.idle(nodes, reading.steps, reading.second_pass)
    known: dict[str, Stage] = {}

    def stages(line: list[tuple[int, str]]) -> Stages:
        for _, one in line:
            if one not in known:
                known[one] = _stage(one, reading, warnings)
        return tuple((until, known[one]) for until, one in line)

    first = stages(schedule.timeline(nodes, reading.steps))
    if reading.second_pass is None:
        return Part(weight, first)
    return Part(weight, first, stages(schedule.timeline(nodes, reading.second_pass, reading.steps)))


def _stage(text: str, reading: Reading, warnings: list[str]) -> Stage:
    """Read the emphasis of a text that holds for some steps."""
    if not reading.emphasis:
        return Stage((Section((Piece(text),)),))
    sections, found = emphasised(text)
    warnings += found
    for section in sections:
        warnings += unusual(section.pieces)
    return Stage(sections, (1.0,) * len(sections))


def show(prompt: Prompt) -> str:
    """Print a prompt in this dialect, so that reading it again for the same steps gives the same parts and networks.

    Raises:
        RequestError: the prompt blends or weighs whole sections, for which this dialect has no words.
    """
    parts = " AND ".join(_show_part(part) for part in prompt.parts)
    return " ".join([parts, *map(show_network, prompt.networks)])


def _show_part(part: Part) -> str:
    """Print a part, its stages nested: each schedule holds the later ones in its second field."""
    steps = part.stages[-1][0]
    line = [*part.stages, *((steps + until, stage) for until, stage in part.second)]
    changes = [(until, stage) for (until, stage), (_, after) in pairwise(line) if stage != after]
    if changes:
        texts = [_show_stage(stage, nested=True) for _, stage in [*changes, line[-1]]]
        head = "".join(f"[{text}:" for text in texts[:-1])
        text = head + texts[-1] + "".join(f":{until}]" for until, _ in reversed(changes))
    else:
        text = _show_stage(line[-1][1], nested=False)
    if weighted(text)[0] != text.strip():  # a colon and a number that are text
        colon = text.rfind(":")
        text = f"{text[:colon]}\\{text[colon:]}"
    return text if part.weight == 1 else f"{text} :{number(part.weight)}"


def _show_stage(stage: Stage, *, nested: bool) -> str:
    sections = tuple(section for section in stage.sections if not isinstance(section, Blend))
    if len(sections) < len(stage.sections) or any(weight != 1 for weight in stage.weights):
        raise RequestError("dialect a1111 has no words for .blend() or for weights of .and(); use dialect compel")
    return show_sections(sections, nested=nested)
