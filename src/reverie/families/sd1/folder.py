"""A diffusers folder of this family, written."""

import shutil
from pathlib import Path
from typing import Any

from reverie.checkpoint.save import write_json
from reverie.families.folder import load_part, save_part
from reverie.families.json_config import read_json

__all__ = ["load_part", "save_part", "save_rest"]


def save_rest(
    folder: Path, tokenizer: Path, scheduler: dict[str, Any], defaults: dict[str, Any], max_length: int | None = None
) -> None:
    """The tokenizer's files, the scheduler's config and `model_index.json`.

    Args:
        defaults: what Reverie draws with where a request does not say (`reverie.json`).
        max_length: ids of a prompt, where it is not what the tokenizer's own settings say.
    """
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    for file in tokenizer.iterdir():
        if file.suffix in {".json", ".txt"}:
            shutil.copyfile(file, folder / "tokenizer" / file.name)
    if max_length:
        settings = folder / "tokenizer" / "tokenizer_config.json"
        write_json(settings, read_json(settings) | {"model_max_length": max_length})
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None], "image_encoder": [None, None], "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    write_json(folder / "model_index.json", index)
    if defaults:
        write_json(folder / "reverie.json", {"defaults": defaults})
