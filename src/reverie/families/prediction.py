"""What a denoising network predicts, and the evidence for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reverie.checkpoint.source import WeightFile
from reverie.families.family import Evidence, Opened
from reverie.families.json_config import Json
from reverie.families.scheduler import read_scheduler

# The last step without signal, as such models are drawn (Lin et al. 2023); its schedulers are those that know it.
ZERO_SNR: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
WITHOUT_ZERO_SNR = {"PNDMScheduler": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}}
MOST_NUMBERS = 64
SAID = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}


@dataclass(frozen=True)
class Prediction:
    """What is predicted, and why that is believed."""

    name: str
    why: str
    zero_snr: bool = False


def signed(file: WeightFile | None) -> Prediction | None:
    """What a file says of itself: marks that trainers put into it, or its metadata; None if it says nothing."""
    if file is None:
        return None
    if "v_pred" in file.tensors:
        zero = "ztsnr" in file.tensors
        return Prediction("v_prediction", "tensors v_pred and ztsnr" if zero else "tensor v_pred", zero)
    declared = file.metadata.get("modelspec.prediction_type", "")
    if declared in SAID:
        return Prediction(SAID[declared], f"metadata modelspec.prediction_type = {declared!r}")
    return None


def scheduler_of(
    opened: Opened, published: Callable[[str], Json], otherwise: Callable[[], Prediction]
) -> tuple[Json, Evidence]:
    """The scheduler config to draw with, and the evidence for its prediction type.

    Args:
        published: the family's scheduler config for a prediction type.
        otherwise: what to believe where neither the file nor a folder says anything.
    """
    found = signed(opened.file)
    if found is None and opened.scheduler is not None:
        name = read_scheduler(opened.scheduler).parameterisation.name
        return opened.scheduler, (f"prediction {name}", "scheduler/scheduler_config.json: prediction_type")
    found = found or otherwise()
    json = dict(opened.scheduler or published(found.name)) | {"prediction_type": found.name}
    if found.zero_snr:
        json |= WITHOUT_ZERO_SNR.get(json.get("_class_name", ""), {}) | ZERO_SNR
    return json, (f"prediction {found.name}", found.why)


def numbers(file: WeightFile, name: str) -> list[float]:
    """The numbers that a mark of a file holds, as many as there could be latent channels.

    Each is the shortest decimal that rounds to it in float32: the one that was once written.
    """
    return [float(str(value)) for value in file.tensor(name).flatten()[:MOST_NUMBERS].float().numpy()]
