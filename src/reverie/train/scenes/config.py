"""What a composed data set shows: the `[data]` section of a training configuration with `kind = "scenes"`."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from reverie.train.scenes.scene import Kind
from reverie.train.scenes.splits import SPLITS, Split

USUAL_MIX: dict[Kind, float] = {"single": 0.4, "coloured": 0.25, "count": 0.15, "relation": 0.17, "ring": 0.03}


class ScenesConfig(BaseModel):
    """A world of things, and how often it shows what.

    Attributes:
        path: a folder of sprites.
        size: width and height of the pictures.
        concepts: how many of the best known things that are drawn in at least six styles, or their names; None is all.
        styles: the drawing styles; none named is all. Captions of the first may leave the style out, others never do.
        mix: how often each kind of scene comes, in any unit; kinds that are not named do not come.
        hold_out: what is never shown; see `reverie.train.scenes.splits`.
        shown: a JSON file of what an earlier stage of the training did show, `{"things": [[name, style], ...], "words":
            [...]}`: it is still not trained on, and never asked as something withheld.
        unseen: a JSON file `{thing: [name, ...], ...}` of further names, which are withheld, too: never trained on.
        first_style: share of scenes in the first style.
        unnamed: share of its captions that leave the style out.
        keywords: share of captions that are lists of key words.
        synonyms: share of names that are another than the main one, where there is one.
        plain: share of scenes on white.
        scatter: how much sizes and places vary where the caption leaves them open; at 0 not at all.
        foreign: share of scenes of single things whose caption is their name in another language.
        languages: which languages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["scenes"] = "scenes"
    path: Path
    size: int = Field(64, ge=16)
    concepts: int | list[str] | None = None
    styles: list[str] = []
    mix: dict[Kind, float] = USUAL_MIX
    hold_out: list[Split] = list(SPLITS)
    shown: Path | None = None
    unseen: Path | None = None
    first_style: float = Field(0.3, ge=0, le=1)
    unnamed: float = Field(0.5, ge=0, le=1)
    keywords: float = Field(0.25, ge=0, le=1)
    synonyms: float = Field(0.4, ge=0, le=1)
    plain: float = Field(0.65, ge=0, le=1)
    scatter: float = Field(1.0, ge=0, le=1)
    foreign: float = Field(0.1, ge=0, le=1)
    languages: list[str] = ["de", "fr", "es", "it", "pt", "nl"]
