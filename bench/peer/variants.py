"""Which programs run, in which settings, and what is measured of each."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

REFERENCE = "diffusers eager"  # whose latents and times the others are compared with: float32, as people run it
STEPS = 20  # of a picture
LONG = 50  # of the picture whose first steps are measured; diffusers' usual number
GUIDANCE = 7.5
PROMPT = "a red apple on a wooden table"
SEED = 7


@dataclass(frozen=True)
class Variant:
    """A program in one setting.

    Attributes:
        runner: who runs it (`peer.runners`).
        options: of the runner.
        group: the requirements that it needs.
        device: where it runs alone; empty where on any.
    """

    runner: str
    options: dict[str, Any] = field(default_factory=dict)
    group: str = "torch"
    device: str = ""


VARIANTS: dict[str, Variant] = {
    "reverie auto": Variant("reverie", {"precision": "auto"}),
    "reverie float32": Variant("reverie", {"precision": "float32"}),
    "reverie bfloat16": Variant("reverie", {"precision": "bfloat16"}),
    "diffusers eager": Variant("diffusers", {"dtype": "float32"}),
    "diffusers bfloat16 channels-last": Variant("diffusers", {"dtype": "bfloat16", "channels_last": True}),
    "diffusers compiled": Variant("diffusers", {"dtype": "bfloat16", "channels_last": True, "compile": "default"}),
    "diffusers compiled, CUDA graphs": Variant(
        "diffusers", {"dtype": "bfloat16", "channels_last": True, "compile": "reduce-overhead"}, device="cuda"
    ),
    "OpenVINO float32": Variant("openvino", {"hint": "f32"}, "openvino", "cpu"),
    "OpenVINO bfloat16": Variant("openvino", {"hint": "bf16"}, "openvino", "cpu"),
    "stable-diffusion.cpp f16": Variant("sdcpp", {"wtype": "f16"}, "sdcpp", "cpu"),
    "stable-diffusion.cpp q8_0": Variant("sdcpp", {"wtype": "q8_0"}, "sdcpp", "cpu"),
}


@dataclass(frozen=True)
class Measure:
    """One thing that is measured.

    Attributes:
        title: in words.
        model: of which checkpoint.
        kind: what the process does: `step`, `decode` or `picture`.
        size: pixels of a side.
        repeats: how often within a process, after once to warm up (steps: twice).
        main: the figure that is compared.
        steps: of the picture that is drawn, or begun.
    """

    title: str
    model: str
    kind: str
    size: int
    repeats: int = 1
    main: str = "seconds"
    steps: int = STEPS


MEASURES: dict[str, Measure] = {
    "step32": Measure("SD 1.5, one step with guidance, 32x32 latents", "sd15", "step", 256, 5, steps=LONG),
    "step64": Measure("SD 1.5, one step with guidance, 64x64 latents", "sd15", "step", 512, 3, steps=LONG),
    "sdxl64": Measure("SDXL, one step with guidance, 64x64 latents", "sdxl", "step", 512, 2, steps=LONG),
    "decode512": Measure("SD 1.5, VAE decoding to 512x512", "sd15", "decode", 512, 3),
    "picture256": Measure(f"SD 1.5, from process start to a 256x256 picture of {STEPS} steps", "sd15", "picture", 256),
    "picture512": Measure(f"SD 1.5, from process start to a 512x512 picture of {STEPS} steps", "sd15", "picture", 512),
}


def chosen(names: Iterable[str], known: Iterable[str], what: str) -> list[str]:
    """The known names that were asked for, all if none were; first words stand for all that begin with them.

    Raises:
        SystemExit: a name that is none of them.
    """
    known, found = list(known), []
    for name in names:
        here = [one for one in known if f"{one.lower()} ".startswith(f"{name.lower()} ")]
        if not here:
            raise SystemExit(f"unknown {what} {name!r}; known: {', '.join(known)}")
        found += here
    return [one for one in known if one in found] if found else known
