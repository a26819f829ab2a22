"""AUTOMATIC1111's `parameters` text, as it and many other programs write it, as a request."""

import math
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from reverie.engine.fields import number
from reverie.engine.metadata import infotext, labels, own
from reverie.engine.metadata.a1111 import ENLARGERS, SIMPLE, TIMESTEP_SAMPLERS, WORDS, title
from reverie.engine.metadata.report import (
    CONTROL,
    NO_IMAGE,
    NO_SAMPLER,
    NO_SETTING,
    NO_SPACING,
    OWN_VAE,
    Found,
    Notes,
    parse_json,
    settle,
    words,
)
from reverie.engine.request import Request
from reverie.errors import RequestError

MOST_TEXT = 2**18  # characters
PROGRAM = "AUTOMATIC1111"
OLD_FIRST_PASS = 512 * 512  # pixels of the first pass of the hires fix before 1.0, where it was not said
SCHEDULE_CHOSEN_APART = (1, 9, 0, 0)  # before, "DPM++ 2M" meant the model's own sigmas
WORDS_ALONE = ("Prompt", "Negative prompt")  # the keys of a text without settings
VERSION = re.compile(r"(?:^|v)(\d{1,4})\.(\d{1,4})\.(\d{1,4})(?:-(\d{1,6}))?")
HASHED = re.compile(r"\s*\[[0-9a-f]{8,64}\]$")  # behind a model's name
RANDOM = {"CPU": "cpu", "cpu": "cpu", "NV": "philox", "GPU": "philox", "cuda": "philox"}
ENLARGED_BY = {label: name for name, label in ENLARGERS.items()}
SAID = {name: {word: value for value, word in words.items()} for name, words in WORDS.items()}
SILENT = {  # they say nothing about the picture that another key does not say
    "Version", "User", "App", "Backend", "Model", "Model hash", "Hashes", "Lora hashes", "Lora weights", "Created Date",
    "Civitai resources", "Styles array", "Refiner switch by sampling steps", "Raw prompt", "Raw negative prompt",
}  # fmt: skip
WHY = {
    "VAE": OWN_VAE, "VAE hash": OWN_VAE,
    "Init image hash": NO_IMAGE,
    "TI hashes": "their files are not in the metadata; give them with --embedding",
    "Face restoration": "faces are not restored",
    "Hires checkpoint": "the second pass draws with the same model",
    "Civitai metadata": "it is for Civitai",
}  # fmt: skip
OTHERS = (  # how `App` or `Version` begins -> preset and dialect that do as it does
    ("ComfyUI", "comfy", "comfy"), ("Fooocus", "comfy", "comfy"), ("SD.Next", "diffusers", None),
    ("stable-diffusion.cpp", None, None),
)  # fmt: skip


def read(text: str) -> Found:
    """What the text says.

    Raises:
        RequestError: too long to be such a text.
    """
    if len(text) > MOST_TEXT:
        raise RequestError(f"the text has {len(text):,} characters; at most {MOST_TEXT:,} are read as parameters")
    reading = _Reading(infotext.parse(text))
    reading.all()
    program = reading.program()
    said = {"preset": program.preset, "dialect": program.dialect}
    request = settle({name: value for name, value in said.items() if value} | reading.fields, reading.notes)
    return Found(program.name, request, reading.model(), reading.notes.lines(), text)


class Program(NamedTuple):
    """Who wrote a text, and the preset and dialect that do as it does."""

    name: str
    preset: str | None = None
    dialect: str | None = None


class _Reading:
    """The settings of a text, taken one after another into fields; what is left is noted."""

    def __init__(self, settings: dict[str, str]) -> None:
        self.settings = settings
        self.left = {key: value for key, value in settings.items() if value != infotext.DEFAULTS.get(key)}
        self.fields: dict[str, Any] = {}
        self.notes = Notes()
        version = settings.get("Version", "")
        self.own = version.startswith(own.PROGRAM)
        found = VERSION.search(version)
        self.version = tuple(int(part or 0) for part in found.groups()) if found else None

    def all(self) -> None:
        """Read everything."""
        self.prompts()
        self.sampler()
        self.simple()
        self.first_pass()
        self.sizes()
        self.hires()
        self.refiner()
        self.random()
        if self.own:
            self.own_keys()
        self.others()

    def take(self, key: str) -> str | None:
        """The value of a key, which is then no longer left over."""
        return self.left.pop(key, None)

    def put(self, name: str, value: Any) -> None:
        """Set a field, or with a dot a field of a group."""
        group, _, inner = name.rpartition(".")
        (self.fields.setdefault(group, {}) if group else self.fields)[inner] = value

    def program(self) -> Program:
        """Who wrote the text."""
        version, app = self.settings.get("Version", ""), self.settings.get("App", "")
        if self.own:
            return Program(version)
        for start, preset, dialect in OTHERS:
            for said in (app, version):
                if said.startswith(start):
                    return Program(said, preset, dialect)
        if "Civitai resources" in self.settings and self.version is None:
            return Program("Civitai")
        if len(self.settings) == len(WORDS_ALONE):
            return Program("a program that wrote no settings")
        return Program(f"{PROGRAM} {version}".strip(), "a1111")

    def model(self) -> dict[str, str]:
        """Name and hash of the model."""
        keys = {"name": "Model", "hash": "Model hash"}
        return {name: self.settings[key] for name, key in keys.items() if self.settings.get(key)}

    def prompts(self) -> None:
        """The words. Hypernetworks had settings of their own before they were written into prompts."""
        prompt, negative = (self.left.pop(key) for key in WORDS_ALONE)
        network, strength = self.take("Hypernet"), self.take("Hypernet strength")
        if network:
            prompt += f"<hypernet:{network}:{strength or '1.0'}>"
        words(self.fields, self.notes, prompt, negative, literal=not self.own)

    def sampler(self) -> None:
        """Sampler and spacing, fused in one label up to 1.8."""
        label = self.take("Sampler")
        found, fused = labels.sampler(label) if label else (None, None)
        if found:
            self.fields["sampler"] = found
        elif label:
            self.notes.add("Sampler", label, NO_SAMPLER)
        said = self.take("Schedule type") or self.take("Scheduler")
        spacing = labels.spacing(said) if said else fused
        if said and spacing is None:
            self.notes.add("Schedule type", said, NO_SPACING)
        spacing = spacing or self.old_spacing(found)
        if spacing:
            self.fields["spacing"] = spacing

    def old_spacing(self, sampler: str | None) -> str | None:
        """What a bare label meant before schedules were chosen apart."""
        unsaid = "Schedule type" not in self.settings and "Scheduler" not in self.settings
        old = self.oldest() if self.version is None else self.version < SCHEDULE_CHOSEN_APART
        timesteps = sampler is None or sampler in TIMESTEP_SAMPLERS | {"restart", "dpm_fast", "dpm_adaptive"}
        return "uniform" if unsaid and old and not self.own and not timesteps else None

    def oldest(self) -> bool:
        """Whether the text has settings and no version, which A1111 has written since 1.3."""
        return "Steps" in self.settings and "Version" not in self.settings

    def simple(self) -> None:
        """Keys that are fields under another name."""
        for key, name in SIMPLE.items():
            value = self.take(key)
            if value is None or (name == "variation_seed" and value == "-1"):
                continue
            if name in SAID:
                self.put(name, SAID[name].get(value, value))
            else:
                self.put(name, number(value) if "_options." in name else value)
        eta = [value for key in ("Eta", "Eta DDIM") if (value := self.take(key)) is not None]
        if eta:
            self.fields["eta"] = eta[0]
        if "upscaler" in self.fields and not self.own:
            self.enlarger("Postprocess upscaler", "upscaler", self.fields.pop("upscaler"), {})
        seed = self.take("Seed")
        if seed is not None and seed != "-1":
            self.fields["seed"] = seed

    def sizes(self) -> None:
        """Sizes, which the grammar has split; 0 is open."""
        for key, names in {"Size": ("width", "height"), "Seed resize from": ("seed_width", "seed_height")}.items():
            for i, name in enumerate(names, 1):
                value = self.take(f"{key}-{i}")
                if value and value.strip("0"):
                    self.fields[name] = value
        if self.take("Tiling") == "True":
            self.fields["seamless"] = "both"
        if (ratio := self.take("Token merging ratio")) is not None:
            self.put("token_merging.ratio", ratio)

    def hires(self) -> None:
        """The second pass: on if there is a strength together with what it enlarges by or to."""
        strength = self.take("Denoising strength")
        size = [
            value if value and value.strip("0") else None
            for value in map(self.take, ("Hires resize-1", "Hires resize-2"))
        ]
        enlarged = any(size) or "Hires upscale" in self.left or "Hires upscaler" in self.left
        if strength is None or not enlarged:
            if strength is not None:
                self.fields["strength"] = strength
            return
        self.fields["hires"] = {"strength": strength} | {
            name: value for name, value in zip(("width", "height"), size, strict=True) if value
        }
        plain = {"Hires upscale": "scale", "Hires prompt": "prompt", "Hires negative prompt": "negative_prompt",
                 "Hires CFG Scale": "guidance_scale"}  # fmt: skip
        for key, name in plain.items():
            if value := self.take(key):
                self.put(f"hires.{name}", value)
        if (steps := self.take("Hires steps")) and steps.strip("0"):
            self.put("hires.steps", steps)
        if enlarger := self.take("Hires upscaler"):
            self.enlarger("Hires upscaler", "hires.upscaler", enlarger, ENLARGED_BY)
        self.second_sampler()

    def refiner(self) -> None:
        """The second model; one that takes over when nothing is left does nothing."""
        name, at = self.take("Refiner"), self.take("Refiner switch at")
        if name and number(at or "") != 1:
            name = HASHED.sub("", name)
            self.fields["refine"] = {"model": name} | ({} if at is None else {"at": at})

    def first_pass(self) -> None:
        """`First pass size`, before 1.0: the size was the second pass's, and 0x0 an area of 512 x 512."""
        first = [self.take(f"First pass size-{i}") or "" for i in (1, 2)]
        if not all(first):
            return
        size = [self.left.get(f"Size-{i}", "512") for i in (1, 2)]
        width, height = (int(side) if len(side) < 6 else 0 for side in size)
        if not all(side.strip("0") for side in first) and width * height:
            ratio = math.sqrt(OLD_FIRST_PASS / (width * height))
            first = [str(math.ceil(ratio * side / 64) * 64) for side in (width, height)]
        for i in (1, 2):
            self.left |= {f"Size-{i}": first[i - 1], f"Hires resize-{i}": size[i - 1]}

    def second_sampler(self) -> None:
        """Sampler and spacing of the second pass."""
        if label := self.take("Hires sampler"):
            found, fused = labels.sampler(label)
            for name, value in (("hires.sampler", found), ("hires.spacing", fused)):
                if value:
                    self.put(name, value)
            if not found:
                self.notes.add("Hires sampler", label, "there is no such sampler here; that of the first pass is used")
        if label := self.take("Hires schedule type"):
            spacing = labels.spacing(label)
            if spacing:
                self.put("hires.spacing", spacing)
            elif label != labels.AUTOMATIC:
                self.notes.add("Hires schedule type", label, "there is no such spacing here")

    def enlarger(self, key: str, name: str, label: str, known: dict[str, str]) -> None:
        """An upscaler by its label. Reverie's own texts name files too, which are kept."""
        from reverie.engine.upscale import UPSCALERS

        if label in known or label in UPSCALERS or self.own:
            self.put(name, known.get(label, label))
        elif label != "None":
            self.notes.add(key, label, "there is no such upscaler here; give its file")

    def random(self) -> None:
        """Where random numbers come from. A GPU's are those of CUDA, which `philox` gives anywhere."""
        said = self.take("RNG")
        if self.own:
            self.fields["rng"] = RANDOM.get(said or "", "device")
        elif said in RANDOM:
            self.fields["rng"] = RANDOM[said]
        elif said is None and self.program().preset == "a1111":
            self.fields["rng"] = RANDOM["GPU"]
        elif said:
            self.notes.add("RNG", said, "there is no such source of random numbers here")

    def own_keys(self) -> None:
        """Fields under their own names, groups and lists as JSON."""
        for name in Request.model_fields:
            value = self.take(title(name))
            if value is None:
                continue
            parsed: Any = value
            if value.startswith(("[", "{")):
                with suppress(RequestError):  # then it stays text, which the request refuses
                    parsed = parse_json(value, title(name))
            self.fields[name] = self.fields.get(name, {}) | parsed if isinstance(parsed, dict) else parsed

    def others(self) -> None:
        """What old versions did otherwise, and what is left over."""
        if self.program().preset == "a1111":
            version = (0, 0, 0, 0) if self.oldest() else self.version
            for before, why, concerned in GATES:
                if version is not None and version < before and concerned(self):
                    self.notes.add("Version", self.settings.get("Version", "none"), why)
        for key, value in self.left.items():
            if key not in SILENT and value not in {"", "{}"}:
                self.notes.add(key, value, self.reason(key))

    def reason(self, key: str) -> str:
        """Why a setting that is left over is."""
        if key.startswith("ControlNet"):
            return CONTROL
        if key.startswith("Hires ") and "hires" not in self.fields:
            return "there is no hires fix without a denoising strength"
        return WHY.get(key, NO_SETTING)


Concerned = Callable[[_Reading], bool]
GATES: tuple[tuple[tuple[int, ...], str, Concerned], ...] = (
    ((1, 6, 0, 0), "before 1.6 its hires pass ran the prompt's schedule once more",
     lambda r: "hires" in r.fields and "[" in r.settings["Prompt"]),
    ((1, 6, 0, 0), "before 1.6 its DDIM and PLMS padded prompts in another way",
     lambda r: r.fields.get("sampler") in {"ddim", "pndm"}),
    ((1, 7, 0, 225), "before 1.7.0-225 it kept alphas_cumprod in half precision", lambda r: True),
)  # fmt: skip
