"""The grammar of AUTOMATIC1111's `parameters` text: prompt lines, negative prompt lines, one line of settings.

Reading takes time linear in the text, whatever the text: the settings are scanned from left to right, each
character a bounded number of times, and patterns are possessive.
"""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

NEGATIVE = "Negative prompt:"
MARKED = re.compile(r"(?>(?:Negative prompt:\s*+)+)")
MOST_JSON = 50  # values in brackets that are tried as JSON; json's errors count the lines before them each time
FEWEST = 3  # settings that make the last line a line of settings
LONGEST_LINE = 2**18  # characters
SPACE = re.compile(r"\s*+")
KEY_RUN = re.compile(r"[\w \-/]++")
VALUE = re.compile(r'("(?>(?:\\.|[^\\"])+)"|[^,]*+)(?:,|$)', re.DOTALL)
UP_TO_COMMA = re.compile(r"\s*+[^,]*+(?:,|$)")
SIZE = re.compile(r"(\d++)x(\d++)")
DEFAULTS = {  # what a missing key means
    "Clip skip": "1", "Hires resize-1": "0", "Hires resize-2": "0", "Hires sampler": "Use same sampler",
    "Hires schedule type": "Use same scheduler", "Hires checkpoint": "Use same checkpoint", "Hires prompt": "",
    "Hires negative prompt": "", "Mask mode": "Inpaint masked", "Masked content": "original",
    "Inpaint area": "Whole picture", "Masked area padding": "32", "RNG": "GPU", "Schedule type": "Automatic",
    "Schedule rho": "0", "Schedule min sigma": "0", "Schedule max sigma": "0", "VAE Encoder": "Full",
    "VAE Decoder": "Full", "FP8 weight": "Disable", "Emphasis": "Original",
    "Refiner switch by sampling steps": "False",
}  # fmt: skip
_JSON = json.JSONDecoder()


def parse(text: str) -> dict[str, str]:
    """The text as AUTOMATIC1111 reads it: `Prompt`, `Negative prompt` and what its settings say.

    A size `512x768` under the key `Size` becomes `Size-1` and `Size-2`. Keys that are not there are left out;
    `DEFAULTS` says what they mean.
    """
    lines = text.strip().split("\n")
    found = list(entries(lines[-1]))
    if len(found) < FEWEST:
        found = []
    else:
        lines.pop()
    prompt, negative = _prompts(lines)
    result = {"Prompt": prompt, "Negative prompt": negative}
    for key, value in found:
        size = SIZE.fullmatch(value)
        result |= {f"{key}-1": size[1], f"{key}-2": size[2]} if size else {key: value}
    return result


def has_settings(text: str) -> bool:
    """Whether the text ends in a line of settings."""
    last = text.rstrip()[-LONGEST_LINE:].rpartition("\n")[2]
    return len(list(islice(entries(last), FEWEST))) == FEWEST


def entries(line: str) -> Iterator[tuple[str, str]]:
    """The `Key: value` pairs of a line of settings; what is no pair is passed over.

    A value is a JSON string, a JSON list or object (Civitai writes them bare), or all up to the next comma.
    """
    at, brackets = 0, 0
    while run := KEY_RUN.search(line, at):
        at = run.end()
        key = run[0].lstrip(" -/")
        if len(key) > 1 and line.startswith(":", at):
            start = SPACE.match(line, at + 1).end()  # type: ignore[union-attr]  # it matches nothing too
            found = None
            if line.startswith(("[", "{"), start) and brackets < MOST_JSON:
                brackets += 1
                found = _bracketed(line, start)
            value, at = found or _value(line, start)
            yield key.strip(), value


def join(prompt: str, negative: str, settings: Mapping[str, object]) -> str:
    """The text; a setting that is None is left out, one that equals its key is written once."""
    written = [
        key if key == value else f"{key}: {quoted(value)}" for key, value in settings.items() if value is not None
    ]
    negative_line = f"\n{NEGATIVE} {negative}" if negative else ""
    return f"{prompt}{negative_line}\n{', '.join(written)}"


def quoted(value: object) -> str:
    """A value as it is written: as a JSON string where it would be read as something else."""
    text = number(value) if isinstance(value, int | float) else str(value)
    plain = text and text == text.strip() and text[0] not in '"[{'
    return text if plain and not any(c in text for c in ",:\n") else json.dumps(text, ensure_ascii=False)


def number(value: float) -> str:
    """A number as short as it can be without loss: 7.0 is `7`, True is `True`."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return repr(value)


def pixels(width: int | None, height: int | None) -> str | None:
    """Width and height as they are written; 0 for one that is open, None if both are."""
    return f"{width or 0}x{height or 0}" if width or height else None


def _value(line: str, at: int) -> tuple[str, int]:
    """The value that begins at `at`, and where the next key may begin."""
    match = VALUE.match(line, at)
    assert match is not None  # its last branch takes anything up to a comma or the end
    return _unquoted(match[1].strip()), match.end()


def _bracketed(line: str, start: int) -> tuple[str, int] | None:
    """As `_value`, for JSON in brackets; None if it is not JSON."""
    try:
        end = _JSON.raw_decode(line, start)[1]
    except (ValueError, RecursionError):
        return None
    rest = UP_TO_COMMA.match(line, end)
    return (line[start:end], rest.end()) if rest else None


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            value: Any = json.loads(text)
        except ValueError:
            return text
        return value if isinstance(value, str) else text
    return text


def _prompts(lines: list[str]) -> tuple[str, str]:
    """Prompt and negative prompt; the latter begins with the first line that is marked so."""
    parts: tuple[list[str], list[str]] = ([], [])
    negative = False
    for line in map(str.strip, lines):
        marked = MARKED.match(line)
        negative = negative or marked is not None
        words, part = line[marked.end() if marked else 0 :], parts[negative]
        if words or part:
            part.append(words)
    return "\n".join(parts[0]), "\n".join(parts[1])
