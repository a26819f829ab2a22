r"""Dynamic prompts: a template becomes another prompt with every seed, or all of its combinations.

    __name__                  a line of NAME.txt; `__animals/*__` of any file that matches
    {a|b}                     one of them; {0.5::a|2::b} by weight
    {2$$a|b|c}                two different ones, joined by ","; {1-2$$ and $$a|b|c} one or two, joined by " and "
    ${x={red|blue}}, ${x}     a variable: drawn anew at each use; ${x=!{red|blue}} once; ${x:grey} with a default
    \{ \} \| \$ \_            these characters as text

The syntax is that of the dynamicprompts library. Everything nests. Variables hold from where they are set.

With a seed, what is drawn depends on nothing else: the choices use only `random.Random(seed).random()`, the one
method whose sequence Python promises to keep across versions.
"""

import bisect
import difflib
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from reverie.errors import RequestError
from reverie.text.pieces import excerpt
from reverie.text.wildcard_files import Wildcards

DEEPEST = 40  # nesting of brackets, wildcards and variables within one another
LONGEST = 1_000_000  # characters of a drawn prompt, and steps to draw it: no template explodes

_TOKEN = re.compile(
    r"(?P<escape>\\.)|(?P<variable>\$\{)|(?P<open>\{)|(?P<close>\})|(?P<bar>\|)"
    r"|__(?P<wildcard>(?>(?:(?!__)[^\s{}|$<>\"\\:])+))__|(?P<text>[^\\${}|_]++|.)",
    re.DOTALL,
)
_BOUNDS = re.compile(r"\s*+(?:([0-9]{1,6})?(-)?([0-9]{1,6})?)\$\$(?:([^${}]*+)\$\$)?")
_WEIGHT = re.compile(r"\s*+([0-9]{1,9}(?:\.[0-9]{0,99})?|\.[0-9]{1,99})::")
_SPACE = re.compile(r"\s++")
_VARIABLE = re.compile(r"\s*+([\w-]++)\s*+(=!|=|:|(?=\}))\s*+")


@dataclass(slots=True, eq=False)
class _Choice:
    """From `low` to `high` different options."""

    options: "list[_Option]"
    low: int = 1
    high: int | None = 1
    joint: str = ","


@dataclass(slots=True, eq=False)
class _Wildcard:
    name: str


@dataclass(slots=True, eq=False)
class _Variable:
    """A use of a variable, or an assignment to it. `how` is the mark behind the name: `=`, `=!`, `:` or nothing."""

    name: str
    how: str
    value: "_Nodes"


_Nodes: TypeAlias = "list[str | _Choice | _Wildcard | _Variable]"
_Option: TypeAlias = "tuple[float, _Nodes | str]"  # a weight, and what it is of; a line of a file is read when drawn


@dataclass(slots=True)
class _Frame:
    """A bracket that is not closed yet: the text that opened it, and the options so far, each with its raw weight."""

    raw: str = ""
    name: str = ""
    how: str = ""
    choice: _Choice | None = None
    options: "list[tuple[str, _Nodes]]" = field(default_factory=lambda: [("", [])])

    def add(self, node: "str | _Choice | _Variable | _Wildcard") -> None:
        self.options[-1][1].append(node)

    def option(self, text: str, at: int) -> int:
        """Begin an option; give the place behind its weight and the space before it."""
        weight = _WEIGHT.match(text, at)
        space = _SPACE.match(text, at)
        end = weight.end() if weight else space.end() if space else at
        self.options.append((text[at:end], []))
        return end

    def closed(self) -> "_Choice | _Variable":
        """Give what the closing bracket makes of it."""
        if self.choice is None:
            return _Variable(self.name, self.how, self.options[0][1])
        weights = (_WEIGHT.match(raw) for raw, _ in self.options)
        self.choice.options = [
            (float(weight.group(1)) if weight else 1.0, nodes)
            for weight, (_, nodes) in zip(weights, self.options, strict=True)
        ]
        return self.choice

    def literal(self) -> "_Nodes":
        """Give the opening bracket and what follows it as text; what is closed within stays what it is."""
        nodes: _Nodes = [self.raw]
        for i, (weight, option) in enumerate(self.options):
            nodes += ["|" * (i > 0) + weight, *option]
        return nodes


@dataclass(frozen=True, eq=False)
class Template:
    """A dynamic prompt that was read.

    Attributes:
        warnings: one line each; empty where every bracket has its counterpart.
    """

    nodes: "_Nodes"
    warnings: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> "Template":
        """Read a template. Never fails: what does not fit is text. Linear in the text, and does not recurse."""
        stack, at, stray, unclosed = [_Frame()], 0, 0, 0
        last = text.rfind("}")  # no bracket behind it can be closed
        while match := _TOKEN.match(text, at):
            kind, at, top = match.lastgroup, match.end(), stack[-1]
            if kind in {"open", "variable"} and at > last:
                unclosed += 1
                top.add(match.group())
            elif kind == "open":
                frame, at = _opened(text, match)
                stack.append(frame)
            elif kind == "variable" and (variable := _VARIABLE.match(text, at)):
                at = variable.end()
                stack.append(_Frame(text[match.start() : at], variable.group(1), variable.group(2)))
            elif kind == "bar" and top.choice:
                at = top.option(text, at)
            elif kind == "close" and len(stack) > 1:
                stack.pop()
                stack[-1].add(top.closed())
            else:
                stray += kind == "close"
                top.add(_leaf(kind, match, within=top.choice is not None))
        for frame in stack[1:]:
            stack[0].options[-1][1].extend(frame.literal())
        return Template(stack[0].options[-1][1], _warnings(unclosed + len(stack) - 1, stray))

    def draw(self, seed: int, wildcards: Wildcards | None = None) -> str:
        """Give the prompt of a seed.

        Raises:
            RequestError: an unknown wildcard or variable, a circle of them, more than a million characters.
        """
        return _Drawing(_by_chance(random.Random(seed)), wildcards or Wildcards()).prompt(self.nodes)

    def combinations(self, wildcards: Wildcards | None = None, *, limit: int = 1000) -> Iterator[str]:
        """Give every prompt that can be drawn, the last choice varying fastest; weights count only where they are 0.

        Raises:
            RequestError: as for `draw`; also behind the last one where there are more than `limit`.
        """
        choices, wildcards = _InTurn(), wildcards or Wildcards()
        for n in itertools.count():
            if n == limit:
                raise RequestError(f"the prompt has more than {limit} combinations: raise the limit or draw by seed")
            yield _Drawing(choices, wildcards).prompt(self.nodes)
            if not choices.advance():
                return


def _opened(text: str, match: re.Match[str]) -> tuple[_Frame, int]:
    """Read the beginning of `{...}`: bounds and the first weight."""
    choice, at = _Choice([]), match.end()
    bounds = _BOUNDS.match(text, at)
    if bounds and any(bounds.groups()[:3]):
        low, dash, high, joint = bounds.groups()
        choice.low = int(low) if low else 1
        choice.high = choice.low if not dash else int(high) if high else None
        choice.joint = "," if joint is None else joint
        at = bounds.end()
    frame = _Frame(text[match.start() : at], choice=choice, options=[])
    return frame, frame.option(text, at)


def _leaf(kind: str | None, match: re.Match[str], *, within: bool) -> "str | _Wildcard":
    """Read a token that holds no others."""
    token = match.group()
    if kind == "wildcard":
        return _Wildcard(match.group("wildcard"))
    if kind == "escape" and (token[1] in "{}$_" or (token[1] == "|" and within)):
        return token[1:]
    return token


def _warnings(unclosed: int, stray: int) -> tuple[str, ...]:
    """Say which brackets do not match."""
    counts = ((unclosed, "opening", "closing"), (stray, "closing", "opening"))
    return tuple(f"{n} {kind} curly bracket(s) without {other} one: read as text" for n, kind, other in counts if n)


Chooser: TypeAlias = Callable[[Sequence[float]], int]


def _by_chance(generator: random.Random) -> Chooser:
    """Choose by weight."""

    def choose(weights: Sequence[float]) -> int:
        sums = list(itertools.accumulate(weights))  # not `sum`, which rounds differently from Python 3.12 on
        if not sums[-1]:
            return int(generator.random() * len(weights))
        return min(bisect.bisect_right(sums, generator.random() * sums[-1]), len(sums) - 1)

    return choose


class _InTurn:
    """Chooses everything once: an odometer whose wheels are the choices that a drawing comes to."""

    def __init__(self) -> None:
        self._wheels: list[list[int]] = []  # position and size of each
        self._next = 0

    def __call__(self, weights: Sequence[float]) -> int:
        possible = [i for i, weight in enumerate(weights) if weight] or list(range(len(weights)))
        if self._next == len(self._wheels):
            self._wheels.append([0, len(possible)])
        self._next += 1
        return possible[self._wheels[self._next - 1][0]]

    def advance(self) -> bool:
        """Turn the last wheel that can be turned; False when all have been round."""
        while self._wheels and self._wheels[-1][0] + 1 == self._wheels[-1][1]:
            self._wheels.pop()
        self._next = 0
        if self._wheels:
            self._wheels[-1][0] += 1
        return bool(self._wheels)


def resolve(text: str, *, seed: int, folder: str | Path | None = None) -> str:
    """Give the prompt that a dynamic one becomes with a seed; see `Template.draw`.

    Args:
        folder: of the wildcards; without one, a prompt that asks for a wildcard is refused.
    """
    return Template.parse(text).draw(seed, Wildcards(None if folder is None else Path(folder)))


class _Drawing:
    """One prompt on its way."""

    def __init__(self, choose: Chooser, wildcards: Wildcards) -> None:
        self._choose, self._wildcards = choose, wildcards
        self._variables: dict[str, _Nodes] = {}
        self._left = LONGEST

    def prompt(self, nodes: "_Nodes") -> str:
        return self._text(nodes, ())

    def _spend(self, cost: int) -> None:
        self._left -= cost
        if self._left < 0:
            raise RequestError(f"the prompt grows beyond {LONGEST:,} characters: a variable or wildcard repeats itself")

    def _text(self, nodes: "_Nodes", within: tuple[str, ...]) -> str:
        """Draw nodes. `within` names the wildcards and variables that they stand in; brackets are nameless."""
        if len(within) > DEEPEST:
            raise RequestError(f"the prompt is nested more than {DEEPEST} deep, at {excerpt(within[-1] or '{')}")
        return "".join(self._node(node, within) for node in nodes)

    def _node(self, node: "str | _Choice | _Wildcard | _Variable", within: tuple[str, ...]) -> str:
        self._spend(len(node) if isinstance(node, str) else 1)
        if isinstance(node, str):
            return node
        if isinstance(node, _Choice):
            return self._choice(node, (*within, ""))
        if isinstance(node, _Wildcard):
            return self._choice(_Choice(self._lines(node.name)), _deeper(within, f"__{node.name}__"))
        return self._variable(node, within)

    def _lines(self, name: str) -> "list[_Option]":
        """Give the lines of a wildcard as options; each is read when it is drawn."""
        lines = self._wildcards.lines(name)
        self._spend(len(lines) // 100)
        matches = ((line, _WEIGHT.match(line)) for line in lines)
        return [(float(m.group(1)), line[m.end() :]) if m else (1.0, line) for line, m in matches]

    def _choice(self, choice: _Choice, within: tuple[str, ...]) -> str:
        """Draw the number of options, then the options, each once."""
        options = list(choice.options)
        if len(options) == 1 and len(options[0][1]) == 1 and isinstance(only := options[0][1][0], _Wildcard):
            within = _deeper(within, f"__{only.name}__")
            options = self._lines(only.name)
        most = len(options) if choice.high is None else choice.high
        low, high = sorted(min(bound, len(options)) for bound in (choice.low, most))
        count = low + (self._choose([1.0] * (high - low + 1)) if high > low else 0)
        texts = []
        for _ in range(count):
            self._spend(len(options) // 100)
            _, drawn = options.pop(self._choose([weight for weight, _ in options]))
            texts.append(self._text(Template.parse(drawn).nodes if isinstance(drawn, str) else drawn, within))
        return choice.joint.join(texts)

    def _variable(self, node: _Variable, within: tuple[str, ...]) -> str:
        """Set a variable, which gives no text, or draw it."""
        if node.how.startswith("="):
            self._variables[node.name] = [self._text(node.value, within)] if node.how == "=!" else node.value
            return ""
        value = self._variables.get(node.name, node.value if node.how else None)
        if value is None:
            near = difflib.get_close_matches(node.name, self._variables, n=1)
            hint = f"did you mean ${{{near[0]}}}?" if near else f"set it before, with ${{{node.name}=...}}"
            raise RequestError(f"unknown variable ${{{excerpt(node.name)[1:-1]}}}; {hint}")
        return self._text(value, _deeper(within, f"${{{node.name}}}"))


def _deeper(within: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Go into a wildcard or variable; one that is being drawn already would never end."""
    if name in within:
        circle = " -> ".join([*(n for n in within[within.index(name) :] if n), name])
        raise RequestError(f"the prompt goes round in a circle: {circle}")
    return (*within, name)
