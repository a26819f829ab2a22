"""Models that were distilled to draw in few steps without guidance: what shows it, and how they are drawn.

No header tells them from the models they were made of: their scheduler does in a folder, else the name that they were
published under, or that their file's metadata give them.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reverie.families.family import Opened
from reverie.families.json_config import Json

TRAILING = {"timestep_spacing": "trailing", "steps_offset": 0}
LCM_CLASSES = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}
STEPS = re.compile(r"(\d{1,2})[-_ ]?step", re.IGNORECASE)
HUB = re.compile(r"models--.+--(.+)")  # a folder of the Hugging Face cache


@dataclass(frozen=True)
class Way:
    """How one kind of distilled model is drawn.

    Attributes:
        name: by which such models are published: a pattern.
        scheduler: what a file without a config is drawn with, over the family's own.
        steps: where the name says none.
        size: rows and columns of latents, if it is not the family's.
    """

    title: str
    name: re.Pattern[str]
    scheduler: Json = field(default_factory=dict)
    steps: int = 4
    size: int | None = None


def _named(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


EULER: dict[str, Any] = {"_class_name": "EulerDiscreteScheduler", **TRAILING}
ANCESTRAL = EULER | {"_class_name": "EulerAncestralDiscreteScheduler"}
# The model cards of stabilityai/sdxl-turbo, ByteDance/SDXL-Lightning, ByteDance/Hyper-SD and latent-consistency.
WAYS = (
    Way("lightning", _named("lightning"), EULER),
    Way(
        "hyper", _named(r"hyper[-_ ]?(?:sd|\d)"),
        {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, **TRAILING}, steps=8,
    ),
    Way("turbo", _named(r"sd[-_]?(?:xl)?[-_]turbo"), ANCESTRAL, steps=1, size=64),
    Way("turbo", _named("turbo"), ANCESTRAL),
    Way("lcm", _named(r"(?<![a-z])lcm(?![a-z])"), {"_class_name": "LCMScheduler", "clip_sample": False}),
    Way("tcd", _named(r"(?<![a-z])tcd(?![a-z])"), {"_class_name": "TCDScheduler", "clip_sample": False}),
)  # fmt: skip


X0 = re.compile(r"[-_]x0(?![a-z0-9])", re.IGNORECASE)  # the one step of SDXL-Lightning that says x0


@dataclass(frozen=True)
class Found:
    """A distilled model.

    Attributes:
        why: what shows it.
        steps: how many it draws in.
        scheduler: what it is drawn with where it brings no config.
    """

    way: Way
    why: str
    steps: int
    scheduler: Json


def distilled(opened: Opened) -> Found | None:
    """The kind of distilled model that a checkpoint is, if anything shows that it is one."""
    ways = {way.title: way for way in WAYS}
    said = (opened.scheduler or {}).get("_class_name")
    names = _names(opened)
    steps = next((int(match[1]) for name in names.values() if (match := STEPS.search(name))), None)
    if said in LCM_CLASSES:
        way = ways[LCM_CLASSES[str(said)]]
        return Found(way, f"scheduler/scheduler_config.json: {said}", steps or way.steps, way.scheduler)
    for where, name in names.items():
        for way in WAYS:
            if way.name.search(name):
                says = {"prediction_type": "sample"} if X0.search(name) else {}
                return Found(way, f"{where} {name!r}", steps or way.steps, {**way.scheduler, **says})
    return None


def _names(opened: Opened) -> dict[str, str]:
    """What a checkpoint is called, by where it is."""
    path = Path(opened.path)
    found = {"the name": path.stem if opened.file is not None else path.name}
    for folder in path.parts:
        if match := HUB.fullmatch(folder):
            found["the name"] = match[1]
    network = opened.file
    if network is not None and network.path != opened.path:
        found["the denoising network's name"] = network.path.stem
    if network is not None:
        found |= {
            f"metadata {key}": network.metadata[key]
            for key in ("modelspec.title", "ss_sd_model_name")
            if network.metadata.get(key)
        }
    return found
