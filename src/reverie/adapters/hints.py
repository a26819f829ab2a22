"""How distilled adapters want to be drawn with: LCM, Turbo, Lightning, Hyper-SD and such, by their files' names.

Such files carry no settings; their names are all that tells. Figures are those of the publishers' model cards:
latent-consistency/lcm-lora-*, ByteDance/SDXL-Lightning and Hyper-SD, jasperai/flash-*, h1t/TCD-*, tianweiy/DMD2,
wangfuyun/PCM_Weights, stabilityai/sdxl-turbo.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

TITLES = ("ss_output_name", "modelspec.title", "modelspec.description")
STEPS = re.compile(r"(?<![0-9])([0-9]{1,2})[-_ ]?steps?(?![a-z0-9])")


@dataclass(frozen=True)
class Hint:
    """How an adapter wants to be drawn with.

    Attributes:
        kind: what it was distilled by.
        guidance_scale: 1 for none.
        options: of the sampler.
        why: what shows it.
    """

    kind: str
    sampler: str
    spacing: str
    steps: int
    guidance_scale: float
    options: Mapping[str, float] = field(default_factory=dict)
    why: str = ""

    def line(self) -> str:
        """In one line."""
        return (
            f"{self.kind} ({self.why}): made for sampler {self.sampler}, spacing {self.spacing}, {self.steps} steps, "
            f"guidance scale {self.guidance_scale:g}"
        )


KINDS: tuple[tuple[re.Pattern[str], Hint], ...] = tuple(
    (re.compile(rf"(?<![a-z]){pattern}(?![a-z])"), hint)
    for pattern, hint in (
        (r"hyper[-_ ]?sd\w*.*cfg", Hint("Hyper-SD with guidance", "ddim", "trailing", 8, 5.0)),
        (r"hyper[-_ ]?(sd|sdxl|sd15|sd3)\w*", Hint("Hyper-SD", "ddim", "trailing", 8, 1.0)),
        (r"(sdxl[-_ ]?)?lightning", Hint("SDXL-Lightning", "euler", "trailing", 4, 1.0)),
        (r"dmd2?", Hint("DMD2", "lcm", "trailing", 4, 1.0)),
        (r"tcd", Hint("TCD", "tcd", "leading", 4, 1.0, {"eta": 0.3})),
        (r"pcm", Hint("PCM", "ddim", "trailing", 4, 1.0)),
        (r"flash[-_ ]?(sd\w*|pixart)", Hint("Flash Diffusion", "lcm", "trailing", 4, 1.0)),
        (r"lcm", Hint("LCM", "lcm", "leading", 4, 1.0)),
        (r"turbo", Hint("Turbo", "euler_a", "trailing", 4, 1.0)),
    )
)  # fmt: skip
ONE_STEP = {"eta": 1.0}  # Hyper-SD's card: TCD with eta 1 at timestep 800


def hint_for(path: Path, metadata: Mapping[str, str]) -> Hint | None:
    """How the adapter in a file wants to be drawn with; None if nothing tells.

    The file's own name goes first, then its titles, then the repository of the hub that it is in
    (`models--latent-consistency--lcm-lora-sdv1-5/...`), then its folder.
    """
    repository = next((part for part in reversed(path.parts) if part.startswith("models--")), "")
    sources = {"its name": path.stem, **{key: metadata.get(key, "") for key in TITLES}}
    for where, text in (sources | {"its repository": repository, "its folder": path.parent.name}).items():
        lowered = text.lower()
        for pattern, hint in KINDS:
            if match := pattern.search(lowered):
                counted = STEPS.search(lowered)
                return _stepped(replace(hint, why=f"{where} has {match[0]!r}"), counted and int(counted[1]))
    return None


def _stepped(hint: Hint, steps: int | None) -> Hint:
    """With the number of steps that a name gives."""
    if not steps:
        return hint
    if steps == 1 and hint.kind == "Hyper-SD":
        return replace(hint, sampler="tcd", steps=1, options=ONE_STEP)
    return replace(hint, steps=steps)
