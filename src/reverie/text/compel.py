r"""The dialect of Compel (InvokeAI, diffusers): `word++`, `(a phrase)1.2`, `("a", "b").blend(0.7, 0.3)`, `.and()`.

The rules are those of Compel 2's documentation (doc/syntax.md) and parser, whose `+` is times 1.1 and `-` times 0.9.
Differences on purpose: `\+`, `\-` and `\\` lose their backslash like the other escapes, and where that parser raises an
error (weights that do not fit in number) there is a warning here.
"""

import re
from dataclasses import dataclass, field
from typing import TypeAlias

from reverie.errors import RequestError
from reverie.text.pieces import (
    REAL,
    Blend,
    Network,
    Piece,
    Prompt,
    Reading,
    Section,
    Stage,
    bounded,
    excerpt,
    limited,
    merged,
    number,
    unusual,
)

MORE, LESS = 1.1, 0.9

_ESCAPE = re.compile(r'\\([()",.+\-=\\])')
_PLAIN = r'(?:\\[()",.+\-=\\]|[^\s()",.+\-=\\]|\\|[+-](?![\s()",.+\-=]|\Z))'
_WORD = re.compile(rf"(?>{_PLAIN}+)")
_FREE = re.compile(r"(?>(?:\\[^\s]|[^\s,\\]|\\)*),?")  # what is no word reaches to the next space or comma
_SIMPLE = re.compile(r'(?>(?:\s++|[^\s()",.+\-=\\]++(?=\s|\Z))+)')  # space, and words in which nothing is special
_SUFFIXES = frozenset("+-.0123456789")  # what can begin a factor
_SIGNS = re.compile(r"\++|-+")
_STRENGTH = re.compile(REAL)
_ATTEND = re.compile(rf"\.attend\(\s*+(\++|-+|{REAL})\s*+\)")
_SWAP = re.compile(r"\.swap\([^()]*+\)")
_LORA = re.compile(rf"\b(?:with|use)Lora\(\s*+([\w-]++)\s*+(?:,\s*+(-?{REAL})\s*+)?\)")
_OPERATOR = re.compile(r"\)\s*+\.(blend|and|add)\s*+\(([^()]*+)\)\s*+")
_ITEM = re.compile(r'\\.|[(),"]|[^\\(),"]++|\\', re.DOTALL)
_OPTION = re.compile(rf"-?{REAL}")
_INSIDE = re.compile(r"\)\s*+\.(?:blend|and|add)\(")
_ACTIVE = re.compile(r'[()"\\]|[+-](?![^\W_])')  # what would be read as syntax, and is printed with a backslash
_PARTING = re.compile(r"(?<=[^\w\s]|_)[.,]|[.,](?=[^\w\s]|_)")  # what brackets would part from its neighbour
_NAME = re.compile(r"[\w-]+")


@dataclass(slots=True, eq=False)
class _Group:
    """Nodes that are multiplied by `factor`. `opening` is the character to print where it is never closed."""

    nodes: "list[_Node]" = field(default_factory=list)
    factor: float = 1.0
    opening: str = ""


_Node: TypeAlias = "str | _Group"


def parse(text: str, reading: Reading) -> Prompt:
    """Read a prompt. Never fails; what cannot have been meant is in the warnings."""
    if not reading.emphasis:
        return Prompt("compel", reading.constant(Stage((Section((Piece(text),)),))))
    warnings: list[str] = []
    networks = []
    for name, weight in _LORA.findall(text):
        strength = bounded(float(weight or 1))
        networks.append(Network("lora", name, strength, strength))
    text = _LORA.sub("", text).strip() if networks else text
    stage = _operated(text, warnings) or Stage((_section(text, warnings),))
    return Prompt("compel", reading.constant(stage), tuple(networks), warnings=limited(warnings))


def _operated(text: str, warnings: list[str]) -> Stage | None:
    """Read `("a", "b").blend(...)` or `.and(...)`, where that is the whole text."""
    start = text.rfind(")", 0, max(text.rfind("("), 0))
    match = _OPERATOR.fullmatch(text, start) if start >= 0 else None
    items = _items(text[:start].strip()) if match else []
    if not match or not items:
        return None
    sections = tuple(_section(item, warnings) for item in items)
    weights, normalise = _options(match.group(2), len(items), warnings)
    if match.group(1) != "blend":
        return Stage(sections, weights)
    if normalise and not sum(weights):
        warnings.append("the weights of .blend() have the sum 0 and are not normalised")
        normalise = False
    return Stage((Blend(sections, weights, normalise),))


def _items(text: str) -> list[str]:
    """Cut `("a", (b c), d` at its commas outside brackets and quotes; nothing where they do not fit."""
    if not text.startswith("("):
        return []
    items, depth, quoted = [[""]], 0, False
    for token in _ITEM.findall(text[1:]):
        if token == '"':
            quoted = not quoted
        elif token in {"(", ")"} and not quoted:
            depth += 1 if token == "(" else -1
        if depth < 0:
            return []
        if token == "," and not quoted and not depth:
            items.append([])
        else:
            items[-1].append(token)
    texts = ["".join(item).strip() for item in items]
    return texts if not quoted and not depth and all(texts) else []


def _options(text: str, count: int, warnings: list[str]) -> tuple[tuple[float, ...], bool]:
    """Read the weights of an operator, and whether they are normalised."""
    options = [option.strip() for option in text.split(",") if option.strip()]
    normalise = "no_normalize" not in options
    numbers = [option for option in options if _OPTION.fullmatch(option)]
    if unknown := [option for option in options if option not in numbers and option != "no_normalize"]:
        warnings.append(f"{excerpt(unknown[0])} is no weight, and not used")
    if numbers and len(numbers) != count:
        warnings.append(
            f"{count} prompts have {len(numbers)} weights; the rest have weight 1, those beyond are not used"
        )
    weights = [bounded(float(value)) for value in numbers[:count]]
    return (*weights, *[1.0] * (count - len(weights))), normalise


def _section(text: str, warnings: list[str]) -> Section:
    """Read a text without operators."""
    if match := _INSIDE.search(text):
        warnings.append(f"{excerpt(match.group())}…) is text here: it acts only on the prompt as a whole")
    section = Section(_pieces(_tree(text, warnings)))
    warnings += unusual(section.pieces)
    return section


def _tree(text: str, warnings: list[str]) -> _Group:
    """Read brackets, quotes and signs. Linear in the text, and does not recurse."""
    stack, quote, at = [_Group()], 0, 0  # `quote`: index in the stack of the open quotation, 0 where there is none
    last = text.rfind(")")  # no bracket behind it is closed
    unclosed = text.find("(", last + 1) >= 0
    while at < len(text):
        opening = stack[-1].opening
        if simple := _SIMPLE.match(text, at):
            stack[-1].nodes.append(simple.group())
            at = simple.end()
        elif (text[at] == "(" and at < last) or (text[at] == '"' and not quote):
            stack.append(_Group(opening=text[at]))
            quote = quote if text[at] == "(" else len(stack) - 1
            at += 1
        elif text[at] == '"' or (text[at] == ")" and opening == "("):
            if text[at] == '"':
                _give_up(stack, quote)
                quote = 0
            at = _factor(stack[-1], text, at + 1, warnings, number=True)
            group = stack.pop()
            stack[-1].nodes.append(group)
        else:
            at = _word(stack[-1], text, at, warnings, free=len(stack) == 1)
    if unclosed or any(group.opening == "(" for group in stack):
        warnings.append("an opening bracket has no closing one and is read as text")
    _give_up(stack, 0)
    return stack[0]


def _give_up(stack: list[_Group], bottom: int) -> None:
    """Read the open groups above one as text."""
    for group in stack[bottom + 1 :]:
        stack[bottom].nodes += [group.opening, *group.nodes]
    del stack[bottom + 1 :]


def _word(group: _Group, text: str, at: int, warnings: list[str], *, free: bool) -> int:
    """Add the word at a place to a group; give the place behind it.

    Args:
        free: outside all brackets, where a word that no sign follows reaches to the next space or comma.
    """
    if word := _WORD.match(text, at):
        weighted = _Group([_ESCAPE.sub(r"\1", word.group())])
        if (end := _factor(weighted, text, word.end(), warnings, number=False)) > word.end():
            group.nodes.append(weighted)
            return end
    rest = _FREE.match(text, at) if free else word
    end = rest.end() if rest else at + 1
    literal = _ESCAPE.sub(r"\1", text[at:end])
    # Inside brackets a comma or full stop is a text of its own, so that it makes no token with what stands beside it.
    group.nodes.append(_Group([literal]) if not free and literal in {",", "."} else literal)
    return end


def _factor(group: _Group, text: str, at: int, warnings: list[str], *, number: bool) -> int:
    """Read what follows a word or a group and weighs it; give the place behind it."""
    if text[at : at + 1] not in _SUFFIXES:
        return at
    if swap := _SWAP.match(text, at):
        warnings.append(f"{excerpt(swap.group())} is not used: prompts are not swapped within a picture")
        return swap.end()
    if attend := _ATTEND.match(text, at):
        group.factor = _strength(attend.group(1))
        return attend.end()
    match = _SIGNS.match(text, at) or (_STRENGTH.match(text, at) if number else None)
    if match:
        group.factor = _strength(match.group())
        return match.end()
    return at


def _strength(text: str) -> float:
    """Give the factor of `++`, `--` or a number."""
    if text[0] in "+-":
        return (MORE if text[0] == "+" else LESS) ** min(len(text), 100)
    return bounded(float(text))


def _pieces(tree: _Group) -> tuple[Piece, ...]:
    """Multiply the factors down the tree; texts that a bracket parted keep a space between them."""
    pieces: list[tuple[str, float]] = []
    parted = False
    todo: list[tuple[_Node | None, float]] = [(tree, 1.0)]
    while todo:
        node, weight = todo.pop()
        if isinstance(node, str) and node:
            last, last_weight = pieces[-1] if pieces else (" ", 0.0)
            if parted and last_weight == weight and _grown(last[-1] + node[0]):
                node = " " + node
            pieces.append((node, weight))
            parted = False
        elif isinstance(node, _Group):
            parted = True
            inner = bounded(weight * node.factor)
            todo += [(None, weight), *((child, inner) for child in reversed(node.nodes))]
        elif node is None:
            parted = True
    return merged(pieces)


def _grown(pair: str) -> bool:
    """Whether two characters side by side could be of one token, where a bracket parted them."""
    if any(one.isspace() for one in pair):
        return False
    first, second = pair[0], pair[1]
    return not ((first in ",." and second.isalnum()) or (second in ",." and first.isalnum()))


def show(prompt: Prompt) -> str:
    """Print a prompt in this dialect, so that reading it again gives the same sections.

    Raises:
        RequestError: it holds what this dialect has no words for: schedules, weights of AND, hypernets.
    """
    stage = prompt.only_stage()
    if stage is None:
        raise RequestError("dialect compel has no words for schedules and AND, which this prompt has some of")
    first = stage.sections[0]
    if isinstance(first, Blend) and len(stage.sections) == 1:
        text = _show_operator("blend", first.sections, first.weights, [] if first.normalise else ["no_normalize"])
    elif any(isinstance(section, Blend) for section in stage.sections):
        raise RequestError("dialect compel has no words for a .blend() within .and()")
    elif len(stage.sections) == 1 and stage.weights == (1.0,):
        text = _show_section(first, edges=bool(prompt.networks)) if isinstance(first, Section) else ""
    else:
        sections = tuple(section for section in stage.sections if isinstance(section, Section))
        text = _show_operator("and", sections, stage.weights, [])
    return " ".join([text, *map(_show_network, prompt.networks)])


def _show_operator(name: str, sections: tuple[Section, ...], weights: tuple[float, ...], flags: list[str]) -> str:
    texts = ", ".join(f'"{_show_section(section)}"' for section in sections)
    return f"({texts}).{name}({', '.join([*map(number, weights), *flags])})"


def _show_section(section: Section, *, edges: bool = False) -> str:
    """Print pieces: bare where the weight is 1 and nothing beside them would be read differently.

    Args:
        edges: whether the space at the ends must be held, for something will stand behind.
    """
    if any(piece.weight < 0 for piece in section.pieces):
        raise RequestError("dialect compel has no words for a weight below 0: a minus is a factor there")
    shown: list[str] = []
    bare = True
    for i, piece in enumerate(section.pieces):
        text = _ACTIVE.sub(r"\\\g<0>", piece.text)
        inside = _PARTING.sub(r"\\\g<0>", text)
        last = i == len(section.pieces) - 1
        joined = not bare and piece.text[:1] in set("0123456789.+-")
        bare = piece.weight == 1 and not joined and (last or piece.text[-1:].isspace())
        bare = bare and not (edges and piece.text.strip() != piece.text and (last or not i))
        shown.append(text if bare else f"({inside}){number(piece.weight)}")
    return "".join(shown)


def _show_network(network: Network) -> str:
    if network.kind != "lora" or network.rank or network.unet != network.text or not _NAME.fullmatch(network.name):
        raise RequestError(f"dialect compel has no words for the network {excerpt(network.name)} and its weights")
    return f"withLora({network.name}, {number(network.text)})"
