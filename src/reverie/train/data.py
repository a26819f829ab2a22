"""Pictures with captions, and batches whose content is a function of the step number alone.

Nothing about the order of data is kept between steps: the batch of step k is computed from the seed and k. A run
that stops and resumes therefore sees what the uninterrupted run would have seen.
"""

import json
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reverie.errors import ConfigError
from reverie.train.config import DataConfig
from reverie.train.scenes import Scenes, ScenesConfig


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A generator that depends on all of the numbers (mixed with NumPy's SeedSequence)."""
    state = np.random.SeedSequence([seed, *numbers]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def indices(total: int, batch: int, step: int, seed: int) -> list[int]:
    """Which rows make up the batch of `step`: a new permutation each epoch, no row left out between epochs."""
    positions = range(step * batch, (step + 1) * batch)
    orders = {
        epoch: torch.randperm(total, generator=generator(seed, 0, epoch)).tolist()
        for epoch in {p // total for p in positions}
    }
    return [orders[p // total][p % total] for p in positions]


Batch: TypeAlias = tuple[Tensor, list[str]]
"""Pixels `(B, 3, H, W)` float32 in [-1, 1], and captions."""


def as_pixels(pictures: Tensor) -> Tensor:
    """Bytes `(B, H, W, 3)` -> `(B, 3, H, W)` float32 in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def as_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels `(B, 3, H, W)` in [-1, 1] as pictures."""
    rounded = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in rounded]


class Examples(Protocol):
    """Pictures with captions."""

    def batch(self, number: int, size: int) -> Batch:
        """Batch `number` of so many pictures: a function of the seed and the numbers alone."""
        ...


def examples(config: DataConfig | ScenesConfig, seed: int) -> "Examples":
    """What a configuration describes.

    Raises:
        ConfigError: it is not there, or broken.
    """
    return ComposedPictures(config, seed) if isinstance(config, ScenesConfig) else PictureSet(config, seed)


class ComposedPictures:
    """Scenes, each shown once."""

    def __init__(self, config: ScenesConfig, seed: int = 0) -> None:
        self.scenes = Scenes(config, seed)

    def batch(self, number: int, size: int) -> Batch:
        """See `Examples`."""
        pictures, captions = self.scenes.batch(range(number * size, (number + 1) * size))
        return as_pixels(torch.from_numpy(pictures)), captions


class PictureSet:
    """A folder with `pictures.npy` (N, H, W, 3) uint8 and `captions.jsonl`, one object with `captions` a picture."""

    def __init__(self, config: DataConfig, seed: int = 0) -> None:
        self.seed = seed
        rows = _read_rows(config.folder / "captions.jsonl")
        pictures = _read_pictures(config.folder / "pictures.npy")
        if len(rows) != len(pictures):
            raise ConfigError(f"{config.folder} has {len(pictures)} pictures but {len(rows)} lines of captions")
        keep = [i for i, row in enumerate(rows) if _kept(row, config.only)]
        if not keep:
            raise ConfigError(f"no picture in {config.folder} matches only = {config.only}")
        self.pictures = torch.from_numpy(pictures[keep])
        self.captions: list[list[str]] = [rows[i]["captions"] for i in keep]

    def __len__(self) -> int:
        return len(self.captions)

    def pixels(self, rows: list[int]) -> Tensor:
        """`(len(rows), 3, H, W)` float32 in [-1, 1]."""
        return as_pixels(self.pictures[rows])

    def chosen(self, number: int, size: int) -> tuple[list[int], list[str]]:
        """The rows of batch `number`, each with one of its captions."""
        rows, g = indices(len(self), size, number, self.seed), generator(self.seed, 2, number)
        return rows, [self.caption(row, g) for row in rows]

    def batch(self, number: int, size: int) -> Batch:
        """See `Examples`."""
        rows, captions = self.chosen(number, size)
        return self.pixels(rows), captions

    def caption(self, row: int, g: torch.Generator) -> str:
        """One of the picture's captions, each as likely."""
        choices = self.captions[row]
        return choices[int(torch.randint(len(choices), (), generator=g))]


def _kept(row: dict[str, Any], only: dict[str, list[str]]) -> bool:
    return all(row.get(field) in values for field, values in only.items())


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; build the data set first") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not one JSON object a line: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.get("captions"):
            raise ConfigError(f"{path}, line {number}: expected an object with a list `captions`")
    return rows


def _read_pictures(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        pictures: np.ndarray[Any, np.dtype[np.uint8]] = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise ConfigError(f"{path} holds {pictures.dtype} {pictures.shape}; expected uint8 (N, H, W, 3)")
    return pictures
