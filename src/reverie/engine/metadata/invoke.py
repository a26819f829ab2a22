"""InvokeAI: `invokeai_metadata` (3 and later), `sd-metadata` (2) and the command line in `Dream` (1 and 2)."""

import re
from collections.abc import Mapping
from typing import Any

from reverie.engine.metadata.keys import Keys
from reverie.engine.metadata.report import ADAPTER, CONTROL, NO_IMAGE, OWN_VAE, Found, parse_object
from reverie.errors import RequestError

PROGRAM = "InvokeAI"
KEYWORDS = ("invokeai_metadata", "sd-metadata", "Dream")
FIELDS = {"seed": "seed", "steps": "steps", "cfg_scale": "guidance_scale", "width": "width", "height": "height",
          "cfg_rescale_multiplier": "guidance_rescale", "strength": "strength"}  # fmt: skip
BOTH_ENCODERS = "one prompt goes to both text encoders"
WHY = {"controlnets": CONTROL, "ipAdapters": ADAPTER, "t2iAdapters": CONTROL, "vae": OWN_VAE,
       "control_layers": CONTROL, "init_image": NO_IMAGE,
       "init_image_path": NO_IMAGE, "positive_style_prompt": BOTH_ENCODERS, "negative_style_prompt": BOTH_ENCODERS,
       "perlin": "Perlin noise is not drawn", "threshold": "thresholding is not drawn here",
       "postprocessing": "what is done to the finished picture is not read"}  # fmt: skip
SILENT = frozenset({"app_version", "generation_mode", "type", "app_id", "model_id", "hrf_method", "ref_images",
                    "canvas_v2_metadata", "regions", "refiner_cfg_scale", "refiner_scheduler", "refiner_steps",
                    "refiner_positive_aesthetic_score", "refiner_negative_aesthetic_score"})  # fmt: skip
DREAM = {"s": "steps", "S": "seed", "W": "width", "H": "height", "C": "cfg_scale", "A": "sampler", "f": "strength",
         "v": "variation_amount", "V": "with_variations", "I": "init_image", "U": "upscale", "G": "facetool_strength",
         "n": "iterations"}  # fmt: skip
ARGUMENT = re.compile(r"\s-{1,2}([A-Za-z]\w{0,40})(?:[ =]+(?!-{1,2}[A-Za-z])(\S{1,500}))?")
NEGATIVE = re.compile(r"\[([^\[\]]*+)\]")


def is_one(texts: Mapping[str, str]) -> bool:
    """Whether chunks are of this program."""
    return any(keyword in texts for keyword in KEYWORDS)


def read(texts: Mapping[str, str]) -> Found:
    """What the newest of the formats that is there says.

    Raises:
        RequestError: it is not of that format.
    """
    keyword = next(keyword for keyword in KEYWORDS if keyword in texts)
    text = texts[keyword]
    if keyword == "Dream":
        return _dream(text)
    settings = parse_object(text, f"InvokeAI's {keyword}")
    return _second(settings, text) if keyword == "sd-metadata" else _third(settings, text)


def _third(settings: Mapping[str, Any], text: str) -> Found:
    keys = Keys(settings)
    keys.fields = {"preset": "diffusers", "dialect": "compel"}
    positive, negative = keys.text("positive_prompt"), keys.text("negative_prompt")
    for side, prompt in (("positive", positive), ("negative", negative)):
        if keys.left.get(f"{side}_style_prompt") == prompt:
            keys.take(f"{side}_style_prompt")
    keys.words(positive, negative)
    keys.plain(FIELDS)
    keys.sampler("scheduler")
    keys.refiner("refiner_model", "refiner_start")
    skipped = keys.take("clip_skip")
    if isinstance(skipped, int) and skipped > 0:  # counts layers left out, where others count from the end
        keys.fields["clip_skip"] = skipped + 1
    axes = [axis for axis in "xy" if keys.take(f"seamless_{axis}") is True]
    if axes:
        keys.fields["seamless"] = "both" if len(axes) == 2 else axes[0]
    if keys.take("rand_device") == "cuda":
        keys.fields["rng"] = "philox"
    if keys.take("hrf_enabled") is True:
        size = {side: keys.take(f"hrf_{side}") for side in ("width", "height")}
        keys.fields["hires"] = {
            name: value for name, value in {**size, "strength": keys.take("hrf_strength")}.items() if value
        }
    keys.loras(_loras(keys.take("loras")))
    keys.model = _model(keys.take("model"))
    version = keys.text("app_version")
    return keys.found(f"{PROGRAM} {version}".strip(), text, why=WHY, silent=SILENT)


def _model(model: Any) -> dict[str, str]:
    """Name and hash; the names of both have changed between versions."""
    if not isinstance(model, dict):
        return {"name": model} if isinstance(model, str) else {}
    names = {"name": model.get("name") or model.get("model_name"), "hash": model.get("hash")}
    return {name: value.removeprefix("sha256:") for name, value in names.items() if isinstance(value, str)}


def _loras(listed: Any) -> list[tuple[Any, Any]]:
    """Names and weights; a LoRA was called `lora` before it was a `model`."""
    entries = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    models = [(one.get("model") or one.get("lora"), one.get("weight")) for one in entries]
    return [(_model(model).get("name"), weight) for model, weight in models]


def _second(settings: Mapping[str, Any], text: str) -> Found:
    image = settings.get("image")
    if not isinstance(image, dict):
        raise RequestError("InvokeAI's sd-metadata have no object image")
    keys = Keys(image)
    prompts = keys.take("prompt")
    parts = (
        [part.get("prompt") if isinstance(part, dict) else part for part in prompts]
        if isinstance(prompts, list)
        else [prompts]
    )
    keys.words(*split(" ".join(part for part in parts if isinstance(part, str))))
    _old(keys)
    keys.model = {
        name: settings[key] for name, key in {"name": "model_weights", "hash": "model_hash"}.items()
        if isinstance(settings.get(key), str)
    }  # fmt: skip
    version = settings.get("app_version")
    return keys.found(f"{PROGRAM} {version}" if isinstance(version, str) else PROGRAM, text, why=WHY, silent=SILENT)


def _dream(text: str) -> Found:
    start, end = text.find('"'), text.rfind('"')
    if start == end:
        raise RequestError("InvokeAI's Dream has no prompt in quotation marks")
    arguments = {DREAM.get(name, name): value or True for name, value in ARGUMENT.findall(text[end + 1 :])}
    keys = Keys(arguments)
    keys.words(*split(text[start + 1 : end]))
    _old(keys)
    return keys.found(PROGRAM, text, why=WHY, silent=SILENT)


def _old(keys: Keys) -> None:
    """What both old formats say."""
    keys.fields |= {"preset": "diffusers", "dialect": "compel"}
    keys.plain(FIELDS)
    keys.sampler("sampler")
    if keys.take("seamless"):
        keys.fields["seamless"] = "both"


def split(words: str) -> tuple[str, str]:
    """Prompt and negative prompt of one text, in which the negative stands in square brackets."""
    negative = ", ".join(part.strip(" ,") for part in NEGATIVE.findall(words))
    return " ".join(NEGATIVE.sub(" ", words).split()), negative
