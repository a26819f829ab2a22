"""Easy Diffusion: a text chunk for every setting, or the same as one JSON object."""

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import PureWindowsPath
from typing import Any

from reverie.engine.metadata.keys import Keys
from reverie.engine.metadata.report import ADAPTER, OWN_VAE, Found

PROGRAM = "Easy Diffusion"
NAMES = {  # as the program's files call them -> as its requests do
    "Prompt": "prompt", "Negative Prompt": "negative_prompt", "Seed": "seed", "Clip Skip": "clip_skip",
    "Stable Diffusion model": "use_stable_diffusion_model", "VAE model": "use_vae_model", "Sampler": "sampler_name",
    "Width": "width", "Height": "height", "Steps": "num_inference_steps", "Guidance Scale": "guidance_scale",
    "Prompt Strength": "prompt_strength", "LoRA model": "use_lora_model", "LoRA Strength": "lora_alpha",
    "Hypernetwork model": "use_hypernetwork_model", "Use Face Correction": "use_face_correction",
    "Use Upscaling": "use_upscale", "Seamless Tiling": "tiling",
}  # fmt: skip
FIELDS = {"seed": "seed", "width": "width", "height": "height", "num_inference_steps": "steps",
          "guidance_scale": "guidance_scale", "prompt_strength": "strength"}  # fmt: skip
WHY = {"use_vae_model": OWN_VAE, "use_hypernetwork_model": ADAPTER}
SILENT = frozenset({"use_embeddings_model", "Software", "stream_progress_updates", "output_format"})


def is_one(settings: Mapping[str, Any]) -> bool:
    """Whether chunks or JSON are of this program."""
    return bool(settings.keys() & {"use_stable_diffusion_model", "Stable Diffusion model"})


def read(settings: Mapping[str, Any], text: str) -> Found:
    """What the settings say.

    Args:
        settings: from the chunks or the JSON.
        text: as they stand.
    """
    keys = Keys({NAMES.get(key, key): value for key, value in settings.items()})
    keys.words(keys.text("prompt"), keys.text("negative_prompt"))
    keys.plain(FIELDS)
    keys.sampler("sampler_name")
    if str(keys.take("clip_skip")).lower() == "true":
        keys.fields["clip_skip"] = 2
    if (tiling := keys.text("tiling")) in {"x", "y", "xy"}:
        keys.fields["seamless"] = "both" if tiling == "xy" else tiling
    keys.model = {"name": PureWindowsPath(keys.text("use_stable_diffusion_model")[:500]).name}
    names, strengths = (_listed(keys.take(key)) for key in ("use_lora_model", "lora_alpha"))
    keys.loras(zip_longest(names, strengths[: len(names)], fillvalue=1.0))
    keys.left = {
        key: None if str(value).lower() in {"none", "false", "null"} else value for key, value in keys.left.items()
    }
    return keys.found(PROGRAM, text, why=WHY, silent=SILENT)


def _listed(value: Any) -> list[Any]:
    """One value, or a list; text chunks have lists as Python writes them."""
    if isinstance(value, str):
        return [part.strip(" '\"") for part in value.strip().removeprefix("[").removesuffix("]").split(",")]
    return value if isinstance(value, list) else [] if value is None else [value]
