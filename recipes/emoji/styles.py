"""The drawing styles, where they come from and on what terms, and which drawing of a set shows which emoji."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.emoji.packages import FLUENT_3D, ICONIFY, Package


@dataclass(frozen=True)
class Style:
    """One emoji set: the word for it in captions, where it comes from and on what terms.

    Attributes:
        key: the word for the style.
        ink: the set is drawn in one ink, which can be of any colour.
        adjective: the word can stand before a thing's name.
    """

    key: str
    set_name: str
    package: Package
    authors: str
    licence: str
    source: str
    ink: bool = False
    adjective: bool = True


_MICROSOFT = ("Microsoft Corporation", "MIT", "github.com/microsoft/fluentui-emoji")
_GOOGLE = ("Google Inc", "Apache-2.0", "github.com/googlefonts/noto-emoji")
_EMOJI_ONE = ("Emoji One (EmojiTwo)", "CC-BY-4.0", "github.com/EmojiTwo/emojitwo")

STYLES = (
    Style("3d", "fluent-emoji-3d", FLUENT_3D, f"{_MICROSOFT[0]} (drawings), LobeHub (package)", *_MICROSOFT[1:]),
    Style("flat", "fluent-emoji-flat", ICONIFY, *_MICROSOFT),
    Style("gradient", "fluent-emoji", ICONIFY, *_MICROSOFT),
    Style("bold line", "fluent-emoji-high-contrast", ICONIFY, *_MICROSOFT, ink=True),
    Style("shaded", "noto", ICONIFY, *_GOOGLE),
    Style("blob", "noto-v1", ICONIFY, *_GOOGLE),
    Style(
        "cartoon", "twemoji", ICONIFY, "Twitter, Inc and other contributors", "CC-BY-4.0", "github.com/jdecked/twemoji"
    ),
    Style("classic", "emojione", ICONIFY, *_EMOJI_ONE),
    Style("silhouette", "emojione-monotone", ICONIFY, *_EMOJI_ONE, ink=True, adjective=False),
    Style(
        "outlined", "streamline-emojis", ICONIFY, "Streamline", "CC-BY-4.0", "github.com/webalys-hq/streamline-vectors"
    ),
    Style("retro", "fxemoji", ICONIFY, "Mozilla", "Apache-2.0", "github.com/mozilla/fxemoji"),
)


# Icons of sets without code points whose names say something else than what they show: the label of what it is, or None
# for what no label fits (a flag called "turkey", revolvers among water pistols).
_FACES = {"cat": "cat face", "dog": "dog face", "mouse": "mouse face", "pig": "pig face", "tiger": "tiger face"}
_SIDES = {"catside": "cat", "dogside": "dog", "mouseside": "mouse", "pigside": "pig", "tigerside": "tiger"}
_CRICKET: dict[str, str | None] = {"pistol": None, "cricket": "cricket game"}
MISNAMED: dict[str, dict[str, str | None]] = {
    "fxemoji": {**_FACES, **_SIDES, "pistol": None, "umbrella": "closed umbrella"},
    "streamline-emojis": {"pistol": None, "turkey": None},
    "noto-v1": _CRICKET,
    "emojione": _CRICKET,
    "emojione-monotone": _CRICKET,
}


def code_key(hexcode: str) -> str:
    """The form in which code points are compared: lower case, without variation selectors."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def squeezed(name: str) -> str:
    """A name without what sets spell differently: case, spaces, hyphens, apostrophes."""
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def name_table(labels: Iterable[tuple[str, str]], icon_sets: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Names of emoji, squeezed -> code points.

    Three sources, the first that knows a name decides: the CLDR labels, the names in sets that list code points, and
    the formal Unicode names of single code points.

    Args:
        labels: (label, hexcode) of every emoji.
        icon_sets: Iconify sets; some have a table `chars` (code points -> name).
    """
    labels = list(labels)
    table: dict[str, str] = {}
    for label, hexcode in labels:
        table.setdefault(squeezed(label), code_key(hexcode))
    for icon_set in icon_sets:
        for code, name in icon_set.get("chars", {}).items():
            table.setdefault(squeezed(name), code_key(code))
    for key in (code_key(hexcode) for _, hexcode in labels):
        formal = unicodedata.name(chr(int(key, 16)), "") if "-" not in key else ""
        if formal:
            table.setdefault(squeezed(formal), key)
    return table


def icons_by_code(icon_set: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, str]:
    """Which icon of a set shows which emoji: {code points: icon name}.

    Sets with code points are matched by these alone, the others by whole names, never by similar ones. Of numbered
    variants ("cactus-1", "cactus-2") the first is taken.
    """
    if icon_set.get("chars"):
        return {code_key(code): name for code, name in icon_set["chars"].items() if name in icon_set["icons"]}
    misnamed = MISNAMED.get(icon_set["prefix"], {})
    found: dict[str, str] = {}
    names = [(name, name) for name in icon_set["icons"]]
    names += [
        (name, alias["parent"]) for name, alias in icon_set.get("aliases", {}).items() if set(alias) == {"parent"}
    ]
    for name, icon in names:
        label = misnamed.get(name, name) or ""
        key = table.get(squeezed(label)) or table.get(squeezed(label.removesuffix("-1")))
        if key is not None and icon in icon_set["icons"]:
            found.setdefault(key, icon)
    return found
