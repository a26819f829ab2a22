"""Which family a path belongs to, from its header alone."""

from collections.abc import Mapping
from pathlib import Path

from reverie.checkpoint.source import TensorInfo, open_weights
from reverie.errors import CheckpointError
from reverie.families.base import Parts
from reverie.families.sd1 import family as sd1
from reverie.families.sd1 import single as sd1_single

# Signs of files that people have and this version does not open yet: (a prefix, or part of a name; what it is).
SIGNS: tuple[tuple[str, str], ...] = (
    ("conditioner.embedders.1.", "Stable Diffusion XL"),
    ("conditioner.embedders.0.model.", "the Stable Diffusion XL refiner"),
    ("cond_stage_model.model.", "Stable Diffusion 2"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("double_blocks.", "Flux"),
    ("lora_unet_", "a LoRA, not a checkpoint"),
    (".lora_", "a LoRA, not a checkpoint"),
    ("controlnet_cond_embedding.", "a ControlNet, not a checkpoint"),
    ("input_hint_block.", "a ControlNet, not a checkpoint"),
    ("input_blocks.0.0.weight", "a U-Net without text encoder or VAE"),
    (
        "down_blocks.0.resnets.0.",
        "one part of a diffusers folder; open the folder that holds model_index.json",
    ),
    ("text_model.", "a text encoder without U-Net"),
)


def load_parts(path: Path, variant: str | None = None) -> Parts:
    """Open a file or a folder of any known family.

    Raises:
        CheckpointError: nothing there, broken, or of no known family; the message says what was seen.
    """
    if path.is_dir():
        if (path / "model_index.json").exists():
            return sd1.load_folder(path, variant)
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise CheckpointError(f"{path} is not a diffusers folder: no model_index.json; found {found}")
    header = open_weights(path).tensors
    if sd1_single.looks_like(header):
        return sd1.load_file(path)
    raise CheckpointError(f"{path} is of no family that this version opens: {_describe(header)}")


def _describe(header: Mapping[str, TensorInfo]) -> str:
    for sign, what in SIGNS:
        if any(sign in name for name in header):
            return f"it looks like {what}"
    first = ", ".join(list(header)[:3])
    return f"{len(header)} tensors, the first are {first}"
