"""Extra networks in a prompt, `<lora:name:te:unet:dyn>`: taken out of the text and given as data."""

import re

from reverie.text.pieces import Network, excerpt, number

# LyCORIS files are LoRAs of other algebra; the file says which.
KINDS = {"lora": "lora", "lyco": "lora", "hypernet": "hypernet"}
_OPENING = re.compile(r"<(\w+):")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,9}(?:\.[0-9]{0,99})?|\.[0-9]{1,99})")
_NAMED = ("te", "unet", "dyn")


def extracted(text: str) -> tuple[str, tuple[Network, ...], list[str]]:
    """Take every `<word:...>` out of a text; give the rest, the networks, and warnings of what is none."""
    kept, networks, warnings, end = [], [], [], 0
    for match in _OPENING.finditer(text):
        if match.start() < end:
            continue
        close = text.find(">", match.end())
        if close < 0:
            break
        if close == match.end():  # `<lora:>` says nothing
            continue
        kept.append(text[end : match.start()])
        end = close + 1
        found = _read(match.group(1), text[match.end() : close])
        if isinstance(found, Network):
            networks.append(found)
        else:
            warnings.append(f"{excerpt(text[match.start() : end])} is left out: {found}")
    return "".join([*kept, text[end:]]), tuple(networks), warnings


def _read(word: str, arguments: str) -> Network | str:
    """Read one tag; a text says what is wrong with it."""
    if (kind := KINDS.get(word)) is None:
        return f"{excerpt(word)} is no kind of network; known: {', '.join(KINDS)}"
    name, *rest = (argument.strip() for argument in arguments.split(":"))
    named = dict(zip(_NAMED, (a for a in rest if "=" not in a), strict=False))
    for argument in (a for a in rest if "=" in a):
        key, _, value = argument.partition("=")
        named[key.strip()] = value.strip()
    if not name:
        return "it has no name"
    for key, value in named.items():
        if key not in _NAMED:
            return f"{excerpt(key)} is no weight; known: {', '.join(_NAMED)}"
        if not _NUMBER.fullmatch(value) or (key == "dyn" and not value.isdecimal()):
            return f"{excerpt(value)} is no {'whole ' if key == 'dyn' else ''}number"
    text = float(named.get("te", 1.0))
    rank = int(named["dyn"]) if "dyn" in named else None
    return Network(kind, name, text, float(named.get("unet", text)), rank)


def show_network(network: Network) -> str:
    """Print a network so that `extracted` gives it again."""
    values = [number(network.text)]
    if network.unet != network.text or network.rank is not None:
        values.append(number(network.unet))
    if network.rank is not None:
        values.append(str(network.rank))
    return f"<{':'.join((network.kind, network.name, *values))}>"
