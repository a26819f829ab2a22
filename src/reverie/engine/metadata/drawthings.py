"""Draw Things: JSON in the user comment of the XMP."""

import html
from typing import Any

from reverie.engine.metadata.keys import Keys
from reverie.engine.metadata.report import CONTROL, Found, parse_object
from reverie.errors import RequestError

PROGRAM = "Draw Things"
OPEN, CLOSE = "<exif:UserComment", "</exif:UserComment>"
FIELDS = {"seed": "seed", "steps": "steps", "scale": "guidance_scale", "strength": "strength",
          "clip_skip": "clip_skip", "mask_blur": "mask_blur"}  # fmt: skip
RANDOM = {"Torch CPU Compatible": "cpu", "NVIDIA GPU Compatible": "philox"}
WHY = {"control": CONTROL, "upscaler": "give the upscaler's file",
       "seed_mode": "its own random numbers are not drawn here"}  # fmt: skip
SILENT = frozenset({"profile", "v2", "crop_top", "crop_left", "original_size", "target_size", "aesthetic_score",
                    "negative_aesthetic_score", "zero_negative_prompt", "negative_original_size", "image_guidance",
                    "mask_blur_outset", "sharpness", "preserve_original_after_inpaint", "upscaler_scale"})  # fmt: skip


def is_one(xmp: str) -> bool:
    """Whether the XMP is of this program."""
    return OPEN in xmp and ("Draw Things" in xmp or '"uc"' in html.unescape(_comment(xmp)))


def read(xmp: str) -> Found:
    """What the XMP says.

    Raises:
        RequestError: no JSON in it.
    """
    comment = _comment(xmp)
    start, end = comment.find("{"), comment.rfind("}")
    if not 0 <= start < end:
        raise RequestError("the XMP of Draw Things has no JSON in its user comment")
    text = html.unescape(comment[start : end + 1])
    keys = Keys(parse_object(text, "the metadata of Draw Things"))
    keys.words(keys.text("c"), keys.text("uc"))
    keys.plain(FIELDS)
    if keys.fields.get("strength") == 1:
        del keys.fields["strength"]  # a picture from words alone
    keys.sampler("sampler")
    keys.refiner("refiner_model", "refiner_start")
    width, x, height = keys.text("size")[:20].partition("x")
    if x:
        keys.fields |= {"width": width, "height": height}
    if random := RANDOM.get(str(keys.left.get("seed_mode"))):
        keys.take("seed_mode")
        keys.fields["rng"] = random
    listed = keys.take("lora")
    keys.loras((one.get("model"), one.get("weight")) for one in _objects(listed))
    keys.model = {"name": keys.text("model")}
    return keys.found(PROGRAM, text, why=WHY, silent=SILENT)


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _comment(xmp: str) -> str:
    """The inside of the first user comment. Its text is found, not parsed: an XML parser would do too much."""
    return xmp.partition(OPEN)[2].partition(CLOSE)[0]
