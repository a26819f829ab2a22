"""A diffusers folder of this family, part by part."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from reverie.checkpoint.load import build
from reverie.checkpoint.save import write_json, write_weights
from reverie.checkpoint.source import WeightFile, open_sharded, open_weights
from reverie.errors import CheckpointError
from reverie.families.sd1 import configs
from reverie.nets.autoencoder import Autoencoder, AutoencoderConfig
from reverie.nets.clip_text import ClipText, ClipTextConfig
from reverie.nets.unet import UNet, UNetConfig

PARTS = ("text_encoder", "unet", "vae")
STEMS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
READERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "text_encoder": configs.text_config, "unet": configs.unet_config, "vae": configs.vae_config,
}  # fmt: skip
WRITERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "text_encoder": configs.text_json, "unet": configs.unet_json, "vae": configs.vae_json,
}  # fmt: skip
MAKERS: dict[str, Callable[[Any], nn.Module]] = {"text_encoder": ClipText, "unet": UNet, "vae": Autoencoder}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: missing, unreadable or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a diffusers folder has it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def weight_files(folder: Path, part: str, variant: str | None = None) -> list[WeightFile]:
    """The mapped weights of one part.

    Args:
        folder: the folder of the part, with `config.json` beside the weights.
        variant: `"fp16"` picks `*.fp16.safetensors`; None takes the plain files, or the only variant there is.

    Raises:
        CheckpointError: there are none, or several variants to choose from.
    """
    stem = STEMS[part]
    for name in _candidates(folder, stem, variant):
        if (folder / name).exists():
            return open_sharded(folder / name) if name.endswith(".json") else [open_weights(folder / name)]
    found = sorted(p.name for p in folder.glob(f"{stem}*")) or sorted(p.name for p in folder.glob("*"))
    wanted = f"{stem}{f'.{variant}' if variant else ''}.safetensors"
    raise CheckpointError(f"no {wanted} in {folder}; found {', '.join(found) or 'nothing'}")


def _candidates(folder: Path, stem: str, variant: str | None) -> list[str]:
    def names(dot_variant: str) -> list[str]:
        return [f"{stem}{dot_variant}.safetensors", f"{stem}.safetensors.index{dot_variant}.json"]

    if variant:
        return names(f".{variant}")
    only = {p.name.split(".")[1] for p in folder.glob(f"{stem}.*.safetensors")}
    only = {v for v in only if "-of-" not in v}
    only |= {p.name.split(".")[-2] for p in folder.glob(f"{stem}.safetensors.index.*.json")}
    return names("") + (names(f".{only.pop()}") if len(only) == 1 else [])


def part_tensors(files: list[WeightFile], part: str) -> dict[str, Tensor]:
    """All tensors of the part under the names of our networks."""
    tensors = {name: file.tensor(name) for file in files for name in file.tensors}
    if part == "text_encoder":
        tensors.pop("text_model.embeddings.position_ids", None)  # a buffer that old transformers saved
        if "embeddings.token_embedding.weight" in tensors:  # some writers drop the prefix
            tensors = {f"text_model.{name}": t for name, t in tensors.items()}
    return tensors


@overload
def load_part(folder: Path, part: Literal["vae"], files: list[WeightFile] | None = None) -> Autoencoder: ...
@overload
def load_part(folder: Path, part: Literal["unet"], files: list[WeightFile] | None = None) -> UNet: ...
@overload
def load_part(folder: Path, part: Literal["text_encoder"], files: list[WeightFile] | None = None) -> ClipText: ...
def load_part(folder: Path, part: str, files: list[WeightFile] | None = None) -> nn.Module:
    """One network from its folder, its parameters mapped from the file in the file's precision.

    Args:
        files: its weights, where `weight_files` has opened them already.

    Raises:
        CheckpointError: see `weight_files`, `read_json` and `reverie.checkpoint.load.build`.
    """
    config = READERS[part](read_json(folder / "config.json"))
    tensors = part_tensors(files or weight_files(folder, part), part)
    return build(lambda: MAKERS[part](config), tensors, f"{part} in {folder}")


def save_part(
    folder: Path,
    part: str,
    config: UNetConfig | AutoencoderConfig | ClipTextConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write `config.json` and the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", WRITERS[part](config))
    weights = {name: t.detach().to("cpu", dtype) for name, t in tensors.items()}
    write_weights(folder / f"{STEMS[part]}.safetensors", weights)


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
