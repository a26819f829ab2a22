"""A diffusers folder, part by part."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from reverie.checkpoint.save import write_json, write_weights
from reverie.checkpoint.source import WeightFile, open_sharded, open_weights
from reverie.errors import CheckpointError
from reverie.families.json_config import read_json
from reverie.families.pieces import KINDS, Kind, Piece
from reverie.nets.autoencoder import Autoencoder
from reverie.nets.clip_text import ClipText
from reverie.nets.unet import UNet


def weight_files(folder: Path, stems: tuple[str, str], variant: str | None = None) -> list[WeightFile]:
    """The mapped weights of one part.

    Args:
        folder: the folder of the part, with `config.json` beside the weights.
        stems: names of the files, as safetensors (which are preferred) and as torch files.
        variant: `"fp16"` picks `*.fp16.safetensors`; None takes the plain files, or the only variant there is.

    Raises:
        CheckpointError: there are none, or several variants to choose from.
    """
    for name in _candidates(folder, stems, variant):
        if (folder / name).exists():
            return open_sharded(folder / name) if name.endswith(".json") else [open_weights(folder / name)]
    found = sorted(p.name for p in folder.glob(f"{stems[0]}*")) or sorted(p.name for p in folder.glob("*"))
    wanted = f"{stems[0]}{f'.{variant}' if variant else ''}.safetensors"
    raise CheckpointError(f"no {wanted} in {folder}; found {', '.join(found) or 'nothing'}")


def _candidates(folder: Path, stems: tuple[str, str], variant: str | None) -> list[str]:
    endings = ((stems[0], "safetensors"), (stems[1], "bin"))

    def names(dot_variant: str) -> list[str]:
        return [
            name
            for stem, ending in endings
            for name in (f"{stem}{dot_variant}.{ending}", f"{stem}.{ending}.index{dot_variant}.json")
        ]

    if variant:
        return names(f".{variant}")
    only: set[str] = set()
    for stem, ending in endings:
        only |= {p.name.split(".")[1] for p in folder.glob(f"{stem}.*.{ending}")}
        only |= {p.name.split(".")[-2] for p in folder.glob(f"{stem}.{ending}.index.*.json")}
    only = {v for v in only if "-of-" not in v}
    return names("") + (names(f".{only.pop()}") if len(only) == 1 else [])


def open_part(folder: Path, part: str, kind: Kind, variant: str | None = None) -> Piece:
    """One network of a folder.

    Raises:
        CheckpointError: a file is missing or broken, or the config asks for a network that we do not have.
    """
    json = read_json(folder / "config.json")
    files = weight_files(folder, kind.stems, variant)
    config = kind.read(json, {name for file in files for name in file.tensors})

    def tensors() -> dict[str, Tensor]:
        return kind.tidied({name: file.weight(name) for file in files for name in file.tensors})

    paths = tuple(file.path for file in files)
    return Piece(part, kind, config, tensors, paths, f"{part} in {folder}", by_shape=False)


@overload
def load_part(folder: Path, part: Literal["vae"]) -> Autoencoder: ...
@overload
def load_part(folder: Path, part: Literal["unet"]) -> UNet: ...
@overload
def load_part(folder: Path, part: Literal["text_encoder"]) -> ClipText: ...
def load_part(folder: Path, part: str) -> nn.Module:
    """One network from its folder, its parameters mapped from the file in the file's precision.

    Raises:
        CheckpointError: see `open_part` and `reverie.checkpoint.load.build`.
    """
    return open_part(folder, part, KINDS[part]).build()


def save_part(
    folder: Path,
    part: str,
    config: Any,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float16,
    said: Mapping[str, object] | None = None,
) -> None:
    """Write `config.json`, with what else is `said` of the part, and the weights."""
    kind = KINDS[part]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", kind.write(config) | dict(said or {}))
    weights = {name: t.detach().to("cpu", dtype) for name, t in tensors.items()}
    write_weights(folder / f"{kind.stems[0]}.safetensors", weights)
