"""Prompts in named dialects: text -> `Prompt`, and back in a canonical form.

The same text means different things to different tools, so that a prompt is only known together with its dialect.
"""

from collections.abc import Callable
from dataclasses import dataclass

from reverie.errors import RequestError
from reverie.registry import Registry
from reverie.text import a1111, comfy, compel
from reverie.text.pieces import Piece, Prompt, Reading, Section, Stage


@dataclass(frozen=True)
class Dialect:
    """One way to write prompts.

    Attributes:
        parse: reads any text; never fails.
        show: prints a prompt so that `parse` gives it again; RequestError for what the dialect has no words for.
        weighting: how weights act on the encoding, a name of `embed.WEIGHTINGS`.
        split: where long texts are cut into chunks, a name of `chunks.SPLITS`.
    """

    parse: Callable[[str, Reading], Prompt]
    show: Callable[[Prompt], str]
    weighting: str
    split: str


def _parse_plain(text: str, reading: Reading) -> Prompt:
    """Take the text as it is."""
    return Prompt("plain", reading.constant(Stage((Section((Piece(text),)),))))


def _show_plain(prompt: Prompt) -> str:
    """Give the text of a prompt that has nothing but text."""
    stage = prompt.only_stage()
    section = stage.sections[0] if stage and len(stage.sections) == 1 else None
    if not isinstance(section, Section) or any(p.weight != 1 for p in section.pieces) or prompt.networks:
        raise RequestError("dialect plain has no words for anything but text, and this prompt has more")
    return "".join(piece.text for piece in section.pieces)


DIALECTS: Registry[Dialect] = Registry("prompt dialect")
DIALECTS.add(
    "a1111", Dialect(a1111.parse, a1111.show, "original", "commas"), ("automatic1111", "webui", "forge", "sdnext")
)
DIALECTS.add("comfy", Dialect(comfy.parse, comfy.show, "interpolate", "words"), ("comfyui",))
DIALECTS.add("compel", Dialect(compel.parse, compel.show, "compel", "sentences"), ("invokeai", "invoke"))
DIALECTS.add("plain", Dialect(_parse_plain, _show_plain, "ignore", "commas"), ("diffusers",))


def parse(
    text: str,
    *,
    dialect: str = "a1111",
    steps: int,
    second_pass: int | None = None,
    emphasis: bool = True,
    negative: bool = False,
    strict: bool = False,
) -> Prompt:
    """Read a prompt. Any text can be read; what cannot have been meant is in `Prompt.warnings`.

    Args:
        dialect: a name of `DIALECTS`.
        steps: of the first pass; schedules refer to them.
        second_pass: steps of the second (hires) pass, where there is one.
        emphasis: False reads brackets, signs and BREAK as text.
        negative: whether this is a negative prompt; see `Reading`.
        strict: refuse what would give a warning.

    Raises:
        RequestError: an unknown dialect, no steps, or with `strict` the first warning.
    """
    if steps < 1 or (second_pass is not None and second_pass < 1):
        raise RequestError(f"a prompt is read for at least 1 step, not for {steps} and {second_pass}")
    prompt = DIALECTS[dialect].parse(text, Reading(steps, second_pass, emphasis, negative))
    if strict and prompt.warnings:
        raise RequestError(f"the prompt is not clear: {prompt.warnings[0]}")
    return prompt


def show(prompt: Prompt, *, dialect: str | None = None) -> str:
    """Print a prompt in its own dialect or, as a conversion, in another one.

    The weights of each piece stay. How they act does not: that is the dialect's `weighting`.

    Raises:
        RequestError: an unknown dialect, or one that has no words for what the prompt says.
    """
    return DIALECTS[dialect or prompt.dialect].show(prompt)
