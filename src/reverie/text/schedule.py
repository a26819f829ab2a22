r"""Prompt scheduling as A1111 writes it: `[from:to:when]`, `[to:when]`, `[from::when]`, alternation `[a|b]`, nested.

The grammar is that of AUTOMATIC1111's stable-diffusion-webui 1.10: inside brackets everything must fit, and where a
bracket does not, it and all that it stands in are text. Where that parser gives up on the whole prompt (a `|` outside
square brackets, a backslash at the very end), here only the character is text.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from reverie.text.pieces import REAL, excerpt

_TOKEN = re.compile(r"\\.|[\[\]()|:]|[^\\\[\]()|:]++|\\", re.DOTALL)
_WHEN = re.compile(rf"\s*+([+-]?{REAL}(?:[eE][+-]?[0-9]++)?)\s*+")


@dataclass(slots=True, eq=False)
class Swap:
    """`before` up to and including a step, `after` from then on; `when` as it was written."""

    before: "Nodes"
    after: "Nodes"
    when: str


@dataclass(slots=True, eq=False)
class Alternation:
    """One option a step, in turn."""

    options: "list[Nodes]"


Node: TypeAlias = "str | Swap | Alternation | Nodes"
Nodes: TypeAlias = "list[Node]"


@dataclass(slots=True)
class _Frame:
    """A bracket that is not closed yet: the fields between its marks, and the marks, `:` or `|`."""

    bracket: str = ""
    fields: list[Nodes] = field(default_factory=lambda: [[]])
    marks: list[str] = field(default_factory=list)

    def add(self, node: Node) -> None:
        self.fields[-1].append(node)

    def mark(self, mark: str) -> None:
        self.marks.append(mark)
        self.fields.append([])

    def literal(self) -> Nodes:
        """Give the opening bracket and what follows it as text; groups inside that are whole stay groups."""
        nodes: Nodes = [self.bracket, *self.fields[0]]
        for mark, more in zip(self.marks, self.fields[1:], strict=True):
            nodes.append(mark)
            nodes += more
        return nodes


def scheduled(text: str) -> tuple[Nodes, list[str]]:
    """Read a text; give its tree, and warnings. Never fails; linear in the text, and does not recurse.

    Round brackets count only within square ones, for otherwise they are text, matched or not.
    """
    first, end = text.find("["), text.rfind("]") + 1
    if not 0 <= first < end:
        return [text], []
    stack, warnings = [_Frame()], []
    stack[0].add(text[:first])
    for token in _TOKEN.findall(text, first, end):
        top = stack[-1]
        if token == "[" or (token == "(" and top.bracket):
            stack.append(_Frame(token))
        elif token in {")", "]"} and top.bracket:
            node = _closed(top, token)
            if node is not None:
                stack.pop()
                stack[-1].add(node)
            else:
                if top.bracket == "[" and token == "]" and ":" in top.marks:
                    warnings.append(_misread(top))
                _give_up(stack)
                stack[0].add(token)
        elif (token == ":" and top.bracket) or (token == "|" and top.bracket == "["):
            top.mark(token)
        else:
            top.add(token)
    _give_up(stack)
    stack[0].add(text[end:])
    return stack[0].fields[0], warnings


def _closed(frame: _Frame, token: str) -> "Node | None":
    """Give what a closing bracket makes of its frame; None where they do not fit."""
    colons = frame.marks.count(":")
    if frame.bracket + token == "()":
        return [*frame.literal(), token] if colons <= 1 else None
    if frame.bracket + token != "[]" or 0 < colons < len(frame.marks):
        return None
    if not frame.marks:
        return [*frame.literal(), token]
    if not colons:
        return Alternation(frame.fields)
    when = frame.fields[-1]
    match = _WHEN.fullmatch(when[0]) if len(when) == 1 and isinstance(when[0], str) else None
    if colons > 2 or match is None:
        return None
    return Swap(frame.fields[0] if colons == 2 else [], frame.fields[-2], match.group(1))


def _give_up(stack: list[_Frame]) -> None:
    """Read every open bracket as text."""
    for frame in stack[1:]:
        stack[0].fields[-1] += frame.literal()
    del stack[1:]


def _misread(frame: _Frame) -> str:
    """Warn of a bracket that looks like a schedule and is none."""
    text = "".join(node if isinstance(node, str) else "…" for node in frame.literal()[:20])
    return f"{excerpt(text + ']')} is no schedule such as [from:to:0.5], and is read as text"


def timeline(nodes: Nodes, steps: int, passed: int | None = None) -> list[tuple[int, str]]:
    """Give `(last step, text)` over a pass of `steps` steps; neighbours differ.

    Args:
        passed: for the second pass the steps of the first. A fraction of 1 to 2, or a step beyond the first pass,
            speaks of the second; all earlier changes have happened by then.
    """
    ends = {steps}
    for node in _changes(nodes):
        if isinstance(node, Alternation):
            ends.update(range(1, steps + 1))
        elif (end := last_before(node.when, steps, passed)) >= 1:
            ends.add(end)
    found: list[tuple[int, str]] = []
    for end in sorted(ends):
        text = _text_at(nodes, end, steps, passed)
        if found and found[-1][1] == text:
            found.pop()
        found.append((end, text))
    return found


def last_before(when: str, steps: int, passed: int | None = None) -> int:
    """Give the last step, from 0 to `steps`, that still has the text before a change.

    With a decimal point `when` is a fraction of the steps, else a step.
    """
    value = float(when)
    if "." in when:
        value = (value - (passed is not None)) * steps
    else:
        value -= passed or 0
    return int(max(0.0, min(value, float(steps))))


def idle(nodes: Nodes, steps: int, second_pass: int | None) -> list[str]:
    """Warn of changes that happen before the first step or after the last one."""
    warnings = []
    for node in _changes(nodes):
        if isinstance(node, Swap):
            ends = [last_before(node.when, steps) / steps]
            if second_pass is not None:
                ends.append(last_before(node.when, second_pass, steps) / second_pass)
            if min(ends) >= 1 or max(ends) <= 0:
                passes = f"{steps} steps" + (f" and {second_pass} of the second pass" if second_pass else "")
                warnings.append(f"the schedule at {node.when} changes nothing within {passes}")
    return warnings


def _changes(nodes: Nodes) -> Iterable[Swap | Alternation]:
    """Walk the tree."""
    todo: list[Node] = [nodes]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo += node
        elif isinstance(node, Swap):
            yield node
            todo += (node.before, node.after)
        elif isinstance(node, Alternation):
            yield node
            todo += node.options


def _text_at(nodes: Nodes, step: int, steps: int, passed: int | None) -> str:
    """Give the text of one step."""
    texts: list[str] = []
    todo: list[Node] = [nodes]
    while todo:
        node = todo.pop()
        if isinstance(node, str):
            texts.append(node)
        elif isinstance(node, list):
            todo += reversed(node)
        elif isinstance(node, Alternation):
            todo.append(node.options[(step - 1) % len(node.options)])
        else:
            todo.append(node.before if step <= last_before(node.when, steps, passed) else node.after)
    return "".join(texts)
