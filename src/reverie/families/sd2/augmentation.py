"""Noise on the picture that two models of Stable Diffusion 2 are shown, the x4 upscaler and unCLIP; its encoder."""

from collections.abc import Mapping

import torch
from torch import Tensor

from reverie.errors import CheckpointError
from reverie.families.assembly import check_widths
from reverie.families.base import Augmentation, ImageEncoder
from reverie.families.family import Opened
from reverie.families.folder import weight_files
from reverie.families.json_config import JsonConfig, read_json
from reverie.families.scheduler import noising
from reverie.families.vision import PART, vision_of, vision_piece, vision_place
from reverie.nets.clip_vision import ClipVision

# low_res_scheduler/scheduler_config.json and model_index.json of stable-diffusion-x4-upscaler; the level is the default
# of its pipeline.
LOW_RES = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
MOST_NOISE, USUAL_NOISE = 350, 20
# Stability's v2-1-stable-unclip-h-inference.yaml `noise_schedule_config`.
COSINE = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
NORMALIZER = "image_normalizer"
AUGMENTOR = "noise_augmentor.data_"  # Stability's CLIPEmbeddingNoiseAugmentation


def upscaled(opened: Opened) -> Augmentation:
    """The noise on the small picture that the x4 upscaler enlarges.

    Raises:
        CheckpointError: a config that cannot be.
    """
    config = opened.path / "low_res_scheduler" / "scheduler_config.json"
    process = noising(read_json(config) if config.is_file() else LOW_RES)
    known = min(opened.pieces["unet"].config.vector_width, process.steps) - 1  # rows of its table of levels
    most = min(JsonConfig(opened.index, "model_index.json").count("max_noise_level", MOST_NOISE), known)
    return Augmentation(process, min(USUAL_NOISE, most), most)


def encoded(opened: Opened) -> Augmentation:
    """The noise on the embedding of a picture that unCLIP draws after.

    Raises:
        CheckpointError: a config that cannot be.
    """
    config = opened.path / "image_noising_scheduler" / "scheduler_config.json"
    process = noising(read_json(config) if config.is_file() else COSINE)
    return Augmentation(process, 0, process.steps - 1)


def image_encoder(opened: Opened) -> ImageEncoder | None:
    """unCLIP's image encoder and the statistics of its embeddings; None where the checkpoint holds the U-Net alone.

    Raises:
        CheckpointError: it is of another width than the U-Net wants, or the statistics are.
    """
    file = opened.file
    if file is not None:
        place = vision_place(file.tensors)
        if place is None:
            return None
        piece = vision_piece(file, place)
        found = {name: file.tensor(AUGMENTOR + name) for name in ("mean", "std") if AUGMENTOR + name in file.tensors}
    elif (opened.path / PART / "config.json").is_file():
        piece, found = vision_of(opened.path), _normalizer(opened)
    else:
        return None
    module = piece.build()
    assert isinstance(module, ClipVision)
    width = module.config.projection_width or module.config.width
    check_widths("the picture's embedding with its noise level", 2 * width, opened.pieces["unet"].config.vector_width)
    return ImageEncoder(module, _statistic(found, "mean", 0.0, width), _statistic(found, "std", 1.0, width))


def _normalizer(opened: Opened) -> dict[str, Tensor]:
    folder = opened.path / NORMALIZER
    if not folder.is_dir():
        return {}
    stem = "diffusion_pytorch_model"
    files = weight_files(folder, (stem, stem))
    return {name: file.tensor(name) for file in files for name in file.tensors}


def _statistic(found: Mapping[str, Tensor], name: str, default: float, width: int) -> Tensor:
    if name not in found:
        return torch.full((1, width), default)
    if found[name].numel() != width:
        raise CheckpointError(f"{NORMALIZER}: {name} holds {found[name].numel()} numbers; expected {width}")
    return found[name].float().reshape(1, width)
