"""Fooocus's JSON. Its other scheme is AUTOMATIC1111's text, read there."""

import re
from typing import Any

from reverie.engine.metadata.keys import Keys
from reverie.engine.metadata.report import OWN_VAE, Found, parse_object
from reverie.errors import RequestError

PROGRAM = "Fooocus"
RESOLUTION = re.compile(r"\(?\s*(\d{1,6})\s*[,x×*]\s*(\d{1,6})\s*\)?")
FIELDS = {"steps": "steps", "guidance_scale": "guidance_scale", "seed": "seed", "clip_skip": "clip_skip",
          "width": "width", "height": "height"}  # fmt: skip
SILENT = frozenset({"version", "metadata_scheme", "created_by", "styles", "performance", "scheme"})
WHY = {"sharpness": "its sharpening of noise is not done here",
       "adm_guidance": "its shift of size conditioning is not done here",
       "adaptive_cfg": "its mimicked guidance is not done here", "vae": OWN_VAE}  # fmt: skip


def read(text: str) -> Found:
    """What the JSON says.

    Fooocus draws with the words as they were typed together with its styles and its expansion: those, its
    `full_prompt`, are the prompt here.

    Raises:
        RequestError: not JSON of Fooocus.
    """
    settings = parse_object(text, "the metadata of Fooocus")
    if not settings.keys() & {"prompt", "full_prompt"}:
        raise RequestError("the metadata of Fooocus have no prompt")
    keys = Keys(settings)
    keys.fields = {"preset": "comfy", "dialect": "comfy"}
    typed, full = keys.text("prompt"), keys.take("full_prompt")
    negative, full_negative = keys.text("negative_prompt"), keys.take("full_negative_prompt")
    keys.words(_joined(full) or typed, _joined(full_negative) or negative)
    keys.plain(FIELDS)
    keys.sampler("sampler", "scheduler")
    if size := RESOLUTION.fullmatch(keys.text("resolution")[:40]):
        keys.fields |= {"width": size[1], "height": size[2]}
    keys.model = {"name": keys.text("base_model"), "hash": keys.text("base_model_hash")}
    keys.refiner("refiner_model", "refiner_switch")
    keys.take("refiner_swap_method")
    keys.loras(_loras(keys))
    return keys.found(keys.text("version") or PROGRAM, text, why=WHY, silent=SILENT)


def _loras(keys: Keys) -> list[tuple[Any, Any]]:
    """`[name, weight, hash]` each; versions before 2.5 say `name : weight` under a key for each."""
    combined = [str(keys.take(key)) for key in list(keys.left) if key.startswith("lora_combined_")]
    listed = keys.take("loras")
    if isinstance(listed, list):
        return [(one[0], one[1]) for one in listed if isinstance(one, list) and len(one) > 1]
    return [(name.strip(), weight.strip()) for name, _, weight in (text.rpartition(":") for text in combined)]


def _joined(parts: Any) -> str:
    return ", ".join(part for part in parts if isinstance(part, str)) if isinstance(parts, list) else ""
