"""SwarmUI's `sui_image_params`."""

from itertools import zip_longest
from typing import Any

from reverie.engine.metadata.keys import Keys
from reverie.engine.metadata.report import NO_IMAGE, NO_MASK, OWN_VAE, Found, parse_object
from reverie.errors import RequestError

PROGRAM = "SwarmUI"
FIELDS = {"seed": "seed", "steps": "steps", "cfgscale": "guidance_scale", "width": "width", "height": "height",
          "variationseed": "variation_seed", "variationseedstrength": "variation_strength",
          "initimagecreativity": "strength"}  # fmt: skip
SEAMLESS = {"true": "both", "X-Only": "x", "Y-Only": "y"}
SILENT = frozenset({"aspectratio", "imageformat", "nopreviews", "swarm_version", "date", "generation_time", "images",
                    "original_prompt", "used_wildcards", "wildcardseed", "wildcardseedbehavior", "prep_time",
                    "automaticvae", "colordepth", "donotsave", "personalnote"})  # fmt: skip
WHY = {"vae": OWN_VAE,
       "refinerupscale": "it is not enlarged for the refiner", "initimage": NO_IMAGE, "maskimage": NO_MASK}  # fmt: skip


def read(text: str) -> Found:
    """What the JSON says.

    Raises:
        RequestError: not JSON of SwarmUI.
    """
    whole = parse_object(text, "the metadata of SwarmUI")
    settings = whole.get("sui_image_params")
    if not isinstance(settings, dict):
        raise RequestError("the metadata of SwarmUI have no object sui_image_params")
    keys = Keys(settings)
    keys.fields = {"preset": "comfy", "dialect": "comfy"}
    keys.words(keys.text("prompt"), keys.text("negativeprompt"))
    keys.plain(FIELDS)
    for old, new in (("comfyuisampler", "sampler"), ("comfyuischeduler", "scheduler")):
        keys.left.setdefault(new, keys.take(old))
    keys.sampler("sampler", "scheduler")
    _refiner(keys)
    names, weights = (_listed(keys.take(key)) for key in ("loras", "loraweights"))
    keys.loras(zip_longest(names, weights[: len(names)], fillvalue=1.0))
    layer = keys.take("clipstopatlayer")
    if isinstance(layer, int) and layer < 0:
        keys.fields["clip_skip"] = -layer
    if seamless := SEAMLESS.get(str(keys.take("seamlesstileable"))):
        keys.fields["seamless"] = seamless
    keys.model = {"name": keys.text("model")} | _hash(whole.get("sui_models"))
    version = keys.text("swarm_version")
    return keys.found(f"{PROGRAM} {version}".strip(), text, why=WHY, silent=SILENT)


def _refiner(keys: Keys) -> None:
    """It takes over for the last part of the steps, or draws over that much of the finished picture."""
    keys.refiner("refinermodel", "refinercontrolpercentage")
    method, refine = keys.text("refinermethod"), keys.fields.get("refine", {})
    share = refine.pop("at", None)
    if isinstance(share, int | float):
        refine |= {"at": round(1 - share, 6)} if method == "StepSwap" else {"strength": share}


def _listed(value: Any) -> list[Any]:
    """A list, which older versions write as one text with commas."""
    return value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []


def _hash(models: Any) -> dict[str, str]:
    """SHA-256 of the checkpoint, which SwarmUI writes with 0x."""
    for model in models if isinstance(models, list) else []:
        if isinstance(model, dict) and model.get("param") == "model" and isinstance(model.get("hash"), str):
            return {"hash": model["hash"].removeprefix("0x")}
    return {}
