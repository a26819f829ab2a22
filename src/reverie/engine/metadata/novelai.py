"""NovelAI: words and settings in `Description` and the JSON of `Comment`; the same hidden in the alpha channel."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from reverie.engine.metadata.keys import Keys
from reverie.engine.metadata.report import Found, Notes, parse_object

PROGRAM = "NovelAI"
STEP = 1.05  # { } strengthens by it, [ ] weakens
FIELDS = {"seed": "seed", "steps": "steps", "scale": "guidance_scale", "width": "width", "height": "height",
          "strength": "strength", "cfg_rescale": "guidance_rescale"}  # fmt: skip
FIXED = {"clip_skip": 2, "eta_noise_delta": 31337}  # what its models were run with; A1111 reads them so
SOURCE = re.compile(r"(.{1,200}?)\s+([0-9A-F]{8})")
SILENT = frozenset({"request_type", "signed_hash", "n_samples", "v4_prompt", "v4_negative_prompt", "legacy_v3_extend",
                    "uncond_scale", "hide_debug_overlay", "version", "stream", "uncond_per_vibe",
                    "wonky_vibe_correlation", "lora_unet_weights", "lora_clip_weights"})  # fmt: skip
WHY = {"sm": "SMEA is not drawn here", "sm_dyn": "SMEA is not drawn here",
       "noise": "noise added to the picture is not read",
       "dynamic_thresholding": "thresholding is not drawn here",
       "reference_strength": "vibe transfer is not drawn here"}  # fmt: skip


def is_one(texts: Mapping[str, Any]) -> bool:
    """Whether chunks are of this program."""
    return "Comment" in texts and (texts.get("Software") == PROGRAM or "NovelAI" in str(texts.get("Title", "")))


def read(texts: Mapping[str, Any]) -> Found:
    """What the chunks say.

    Raises:
        RequestError: the comment is not JSON.
    """
    comment = texts.get("Comment")
    keys = Keys(comment if isinstance(comment, dict) else parse_object(str(comment), "NovelAI's comment"))
    description, typed, negative = texts.get("Description"), keys.text("prompt"), keys.text("uc")
    prompt = description if isinstance(description, str) else typed
    keys.words(weighted(prompt, keys.notes), weighted(negative, keys.notes))
    keys.fields |= FIXED
    keys.plain(FIELDS)
    if keys.left.get("noise_schedule") == "native":
        keys.left["noise_schedule"] = "uniform"
    keys.sampler("sampler", "noise_schedule")
    source = SOURCE.fullmatch(str(texts.get("Source", ""))[:300])
    keys.model = {"name": source[1], "hash": source[2].lower()} if source else {}
    return keys.found(PROGRAM, str(comment), why=WHY, silent=SILENT)


def weighted(text: str, notes: Notes) -> str:
    """NovelAI's braces and brackets as weights of the a1111 dialect; round brackets are letters there.

    Brackets that do not pair are letters here.
    """
    if "::" in text:
        notes.add("Description", text, "weights written as 1.5::words:: are not read")
    pairs = dict(_pairs(text))
    strong, weak = f":{STEP:g})", f":{1 / STEP:.4f})"
    parts = []
    for i, letter in enumerate(text):
        if i in pairs:
            parts.append({"{": "(", "[": "(", "}": strong, "]": weak}[letter])
        else:
            parts.append(f"\\{letter}" if letter in "()[]" else letter)
    return "".join(parts)


def _pairs(text: str) -> Iterator[tuple[int, int]]:
    """The places of brackets that pair, both ways."""
    waiting: list[int] = []
    for i, letter in enumerate(text):
        if letter in "{[":
            waiting.append(i)
        elif letter in "}]" and waiting and text[waiting[-1]] == {"}": "{", "]": "["}[letter]:
            start = waiting.pop()
            yield start, i
            yield i, start
