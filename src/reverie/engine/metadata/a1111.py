"""A request as AUTOMATIC1111's `parameters` text. `a1111_read.py` is the way back and reads the same tables.

Every field that decides the picture is in the text, but for the pictures it begins with: under the key that the
ecosystem knows where there is one, else under its own name (`Guidance rescale: 0.7`), which others pass over.
"""

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from reverie import __version__
from reverie.engine.metadata import infotext, labels, own
from reverie.engine.request import HANDED_OVER, Extend, Hires, Micro, Refine, Request, Tiles, Travel
from reverie.engine.thrift import Cache, Merging

# Key -> field, or group.field, for values that stand in the text as they are (or in the words of `WORDS`).
GUIDANCE = {"CFG scale": "guidance_scale", "Image CFG scale": "image_guidance_scale"}
VARIATION = {"Variation seed": "variation_seed", "Variation seed strength": "variation_strength"}
MASK = {
    "Mask blur": "mask_blur", "Inpaint area": "mask_area", "Masked area padding": "mask_padding",
    "Masked content": "mask_fill", "Mask mode": "mask_invert",
}  # fmt: skip
DETAILS = {
    "Sigma churn": "sampler_options.s_churn", "Sigma tmin": "sampler_options.s_tmin",
    "Sigma tmax": "sampler_options.s_tmax", "Sigma noise": "sampler_options.s_noise",
    "Discard penultimate sigma": "discard_penultimate", "Schedule rho": "spacing_options.rho",
    "Schedule min sigma": "spacing_options.sigma_min", "Schedule max sigma": "spacing_options.sigma_max",
    "UniPC variant": "sampler_options.variant", "UniPC order": "sampler_options.order",
    "UniPC lower order final": "sampler_options.lower_order_final", "Beta schedule alpha": "spacing_options.alpha",
    "Beta schedule beta": "spacing_options.beta",
    "Emphasis": "emphasis", "Postprocess upscaler": "upscaler",
}  # fmt: skip
SIMPLE = {"Steps": "steps", "Clip skip": "clip_skip", "ENSD": "eta_noise_delta"} | GUIDANCE | VARIATION | MASK | DETAILS
WORDS: dict[str, dict[Any, str]] = {
    "mask_area": {"whole": "Whole picture", "masked": "Only masked"},
    "mask_fill": {"original": "original", "fill": "fill", "noise": "latent noise", "zero": "latent nothing"},
    "mask_invert": {False: "Inpaint masked", True: "Inpaint not masked"},
    "emphasis": {"original": "Original", "no_norm": "No norm", "ignore": "Ignore", "none": "None"},
}
ENLARGERS = {  # the web UI's own ways to enlarge for the second pass
    "latent": "Latent", "latent_antialiased": "Latent (antialiased)", "latent_bicubic": "Latent (bicubic)",
    "latent_bicubic_antialiased": "Latent (bicubic antialiased)", "latent_nearest": "Latent (nearest)",
    "latent_nearest_exact": "Latent (nearest-exact)", "lanczos": "Lanczos", "nearest": "Nearest",
}  # fmt: skip
# Groups whose rest is written only if there is one.
PARTLY = {"sampler_options", "spacing_options", "hires", "refine", "token_merging"}
TIMESTEP_SAMPLERS = {"ddim", "pndm", "unipc", "ddim_cfg_pp"}  # their eta is called `Eta DDIM`
NOWHERE = {"prompt", "negative_prompt", "batch_size", "image", "mask", "depth", "wildcards", "vae_tile"}


def write(request: Request, model: Mapping[str, str], pictures: Mapping[str, str] | None = None) -> str:
    """The text of one picture.

    Args:
        request: resolved, for this picture alone.
        model: `name` and `hash`, and `refiner_hash`; all may be absent.
        pictures: SHA-256 of the files that the request begins with, by field.
    """
    flat = _Flat(request)
    return infotext.join(request.prompt, request.negative_prompt, {
        **flat.sampling(), **_model(model), **_adapters(model), **flat.many(VARIATION), **flat.seed_size(),
        **flat.denoising(),
        **flat.many({"Clip skip": "clip_skip", "ENSD": "eta_noise_delta"}), **_picture(pictures or {}), **flat.rng(),
        **flat.tiling(), **flat.merging(), **flat.hires(), **flat.refiner(model.get("refiner_hash", "")),
        **flat.mask(), **flat.eta(), **flat.many(DETAILS), **flat.rest(),
        "Version": f"{own.PROGRAM} {__version__}",
    })  # fmt: skip


def title(field: str) -> str:
    """The key of a field that the ecosystem has none for."""
    return field.replace("_", " ").capitalize()


def _model(model: Mapping[str, str]) -> dict[str, str | None]:
    return {"Model hash": model.get("hash", "")[:10] or None, "Model": model.get("name") or None}


def _adapters(model: Mapping[str, str]) -> dict[str, str | None]:
    """The hashes of LoRAs and textual inversions, by the names that prompts call them by."""
    shorts = {"Lora hashes": "lora short: ", "TI hashes": "embedding: "}
    listed = {
        key: ", ".join(f"{name.removeprefix(start)}: {value[:12]}" for name, value in model.items()
                       if name.startswith(start))
        for key, start in shorts.items()
    }  # fmt: skip
    return {key: text or None for key, text in listed.items()}


def _picture(pictures: Mapping[str, str]) -> dict[str, str | None]:
    return {"Init image hash": pictures.get("image", "")[:10] or None}


class _Flat:
    """The fields of a request, those of groups as `group.field`; knows which have been written."""

    def __init__(self, request: Request) -> None:
        self.fields = own.stored(request)
        self.values = _flattened(self.fields)
        groups = Request(
            hires=Hires(), extend=Extend(), tiles=Tiles(), travel=Travel(), sizes=Micro(), refine=Refine(model=""),
            cache=Cache(), token_merging=Merging(),
        )  # fmt: skip
        self.defaults = _flattened(own.stored(groups))
        self.written = set(NOWHERE)

    def take(self, name: str, *, always: bool = False) -> Any:
        """The value as it is written; None if it is the default."""
        self.written.add(name)
        value = self.values.get(name)
        if value == self.defaults.get(name) and not always:
            return None
        return WORDS[name].get(value, value) if name in WORDS else value

    def many(self, keys: Mapping[str, str]) -> dict[str, Any]:
        """The values that are no defaults, by their keys."""
        return {key: self.take(name) for key, name in keys.items()}

    def labels(self, group: str = "") -> tuple[str | None, str]:
        """A sampler and its spacing as labels. A spacing whose label means another one is left for `rest`."""
        sampler, name = self.take(f"{group}sampler"), self.take(f"{group}spacing")
        label, said = labels.written(sampler, name)
        if name and labels.spacing(said) != labels.spacing(name):
            self.written.discard(f"{group}spacing")
        return label, said

    def sampling(self) -> dict[str, Any]:
        """What every text has."""
        sampler, spacing = self.labels()
        seed = self.take("seed")
        return {
            "Steps": self.take("steps"), "Sampler": sampler, "Schedule type": spacing, **self.many(GUIDANCE),
            "Seed": -1 if seed is None else seed, "Size": infotext.pixels(self.take("width"), self.take("height")),
        }  # fmt: skip

    def seed_size(self) -> dict[str, Any]:
        """The size whose noise is drawn."""
        return {"Seed resize from": infotext.pixels(self.take("seed_width"), self.take("seed_height"))}

    def denoising(self) -> dict[str, Any]:
        """The strength of the second pass if there is one, else that of the first picture."""
        if self.fields["hires"]:
            return {"Denoising strength": self.take("hires.strength", always=True)}
        return {"Denoising strength": self.take("strength", always=self.fields["image"] is not None)}

    def rng(self) -> dict[str, Any]:
        """Left out for a GPU's own, as the web UI does."""
        source = self.take("rng") or "cpu"
        return {"RNG": {"cpu": "CPU", "philox": "NV"}.get(source)}

    def tiling(self) -> dict[str, Any]:
        """Seamless on both axes; one alone has no key in the web UI."""
        if self.fields["seamless"] != "both":
            return {}
        self.written.add("seamless")
        return {"Tiling": True}

    def merging(self) -> dict[str, Any]:
        """The share of tokens that is merged away; the web UI has the other settings as ours are by default."""
        if not self.fields["token_merging"]:
            return {}
        return {"Token merging ratio": self.take("token_merging.ratio", always=True)}

    def hires(self) -> dict[str, Any]:
        """The second pass."""
        if not self.fields["hires"]:
            return {}
        scale = self.take("hires.scale")
        size = infotext.pixels(self.take("hires.width"), self.take("hires.height"))
        enlarger = self.take("hires.upscaler", always=True)
        sampler, spacing = self.labels("hires.")
        return {
            "Hires prompt": self.words("prompt"), "Hires negative prompt": self.words("negative_prompt"),
            "Hires upscale": scale or (None if size else self.defaults["hires.scale"]),
            "Hires upscaler": ENLARGERS.get(enlarger, enlarger), "Hires steps": self.take("hires.steps"),
            "Hires resize": size, "Hires sampler": sampler,
            "Hires schedule type": None if spacing == labels.AUTOMATIC else spacing,
            "Hires CFG Scale": self.take("hires.guidance_scale"),
        }  # fmt: skip

    def refiner(self, hash_: str) -> dict[str, Any]:
        """The model that takes over, by its name as the web UI writes it."""
        if not self.fields["refine"]:
            return {}
        name = PurePath(self.take("refine.model")).stem + (f" [{hash_[:10]}]" if hash_ else "")
        at = self.take("refine.at")
        over = self.values["refine.strength"] is not None
        return {"Refiner": name, "Refiner switch at": at or (None if over else HANDED_OVER)}

    def words(self, name: str) -> str | None:
        """A prompt of the second pass. The web UI takes an empty one for none: it is left for `rest`."""
        return self.take(f"hires.{name}") if self.values[f"hires.{name}"] else None

    def mask(self) -> dict[str, Any]:
        """How the mask is used; its blur always, which the web UI takes from its form otherwise."""
        blur = {"Mask blur": self.take("mask_blur", always=self.fields["mask"] is not None)}
        return blur | {key: self.take(name) for key, name in MASK.items() if key not in blur}

    def eta(self) -> dict[str, Any]:
        """Samplers on timesteps have a key of their own."""
        timesteps = self.fields["sampler"] in TIMESTEP_SAMPLERS
        return {"Eta DDIM" if timesteps else "Eta": self.take("eta")}

    def rest(self) -> dict[str, Any]:
        """What no key of the ecosystem stands for; groups, lists and tables as JSON."""
        left = {}
        for name, value in self.fields.items():
            if name in self.written or value in (self.defaults.get(name), None):
                continue
            if isinstance(value, dict):
                others = {key: inner for key, inner in value.items() if self._left(f"{name}.{key}", inner)}
                if others or name not in PARTLY:
                    left[title(name)] = json.dumps(others)
            else:
                left[title(name)] = json.dumps(value) if isinstance(value, list) else value
        return left

    def _left(self, name: str, value: object) -> bool:
        return name not in self.written and value != self.defaults.get(name)


def _flattened(fields: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat
