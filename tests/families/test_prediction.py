"""What a model predicts, by what its file says of itself, by its folder, by its weights, and by who asks."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reverie.diffusion.parameterisation import PARAMETERISATIONS, Edm
from reverie.diffusion.process import EdmProcess, FlowProcess, Process
from reverie.diffusion.spacing import space
from reverie.errors import CheckpointError, RequestError
from reverie.families.detect import load_parts
from tests import tiny
from tests.families.models import file_of, folder_of, loaded


def marked(source: Path, target: Path, marks: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(load_file(source) | {name: t.clone() for name, t in marks.items()}, target, metadata)
    return target


ONE = torch.ones(1)
MARKS: dict[str, tuple[dict[str, Tensor], dict[str, str], str, str]] = {
    "nothing": ({}, {}, "epsilon", "no sign of v-prediction"),
    "v_pred": ({"v_pred": ONE}, {}, "v_prediction", "tensor v_pred"),
    "v_pred and ztsnr": ({"v_pred": ONE, "ztsnr": ONE}, {}, "v_prediction", "tensors v_pred and ztsnr"),
    "ztsnr alone": ({"ztsnr": ONE}, {}, "epsilon", "no sign of v-prediction"),
    "metadata v": ({}, {"modelspec.prediction_type": "v"}, "v_prediction", "modelspec.prediction_type = 'v'"),
    "metadata epsilon": ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon", "modelspec.prediction_type"),
    "metadata of another kind": ({}, {"modelspec.prediction_type": "x"}, "epsilon", "no sign of v-prediction"),
    "a mark before metadata": (
        {"v_pred": ONE}, {"modelspec.prediction_type": "epsilon"}, "v_prediction", "tensor v_pred",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "marks"), [*(("sd1", marks) for marks in MARKS), ("sdxl", "v_pred"), ("sdxl", "v_pred and ztsnr")]
)
def test_marks(root: Path, tmp_path: Path, kind: str, marks: str) -> None:
    tensors, metadata, prediction, why = MARKS[marks]
    parts = load_parts(marked(file_of(root, kind), tmp_path / "a.safetensors", tensors, metadata))
    assert parts.identity.prediction == parts.parameterisation.name == prediction
    assert why in dict(parts.identity.evidence)[f"prediction {prediction}"]
    zero = marks == "v_pred and ztsnr"
    assert (parts.process.sigma_max > 1000) == zero  # no signal is left: sigma is 4096, not 14.6
    assert (parts.defaults.spacing == "trailing") == zero
    assert parts.defaults.sampler == {"sd1": "ddim" if zero else "pndm", "sdxl": "euler"}[kind]


def test_zero_snr_is_what_diffusers_makes_of_it(root: Path, tmp_path: Path) -> None:
    marks = {"v_pred": ONE, "ztsnr": ONE}
    parts = load_parts(marked(file_of(root, "sdxl"), tmp_path / "a.safetensors", marks))
    reference = tiny.scheduler_of(tiny.EULER | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    reference.set_timesteps(10)
    sigmas = space(parts.defaults.spacing, 10, parts.process, parts.defaults.rules)
    torch.testing.assert_close(sigmas.float(), reference.sigmas, rtol=1e-4, atol=1e-4)


# Stable Diffusion 2, whose files do not say


@cache
def four_levels() -> Any:
    """A U-Net deep enough to have the norm whose bias tells the two kinds apart."""
    torch.manual_seed(0)
    return tiny.unet(
        block_out_channels=(32,) * 4, cross_attention_dim=32, attention_head_dim=1, use_linear_projection=True,
        **tiny.levels((1, 1, 1, 0)),
    )  # fmt: skip


def spread_out(spread: float) -> dict[str, Tensor]:
    """The same with a bias of this standard deviation, in the original layout."""
    unet = four_levels()
    torch.nn.init.normal_(unet.get_parameter("up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"), 0.0, spread)
    state = unet.state_dict()
    tensors = {f"model.diffusion_model.{tiny.ldm_unet_name(name, state)}": t for name, t in state.items()}
    assert "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias" in tensors
    return tensors


@pytest.mark.parametrize(("spread", "prediction", "size"), [(0.2, "v_prediction", 96), (0.05, "epsilon", 64)])
def test_the_bias_of_one_norm(root: Path, tmp_path: Path, spread: float, prediction: str, size: int) -> None:
    """Above 0.09 the model predicts v and was made for 768 pixels; the scheduler is that of the published folder."""
    rest = {n: t for n, t in load_file(file_of(root, "sd2")).items() if not n.startswith("model.")}
    save_file(spread_out(spread) | rest, tmp_path / "a.safetensors")
    parts = load_parts(tmp_path / "a.safetensors")
    assert parts.identity.prediction == prediction
    assert "norm1.bias has standard deviation" in dict(parts.identity.evidence)[f"prediction {prediction}"]
    assert parts.defaults.width == parts.defaults.height == size * parts.vae.config.factor
    assert parts.defaults.sampler == ("ddim" if prediction == "v_prediction" else "pndm")


def test_what_a_folder_says_holds_for_a_unet_that_says_nothing(root: Path, tmp_path: Path) -> None:
    """And a mark in the U-Net's file holds before what the folder says."""
    folder, unet = folder_of(root, "sd2-v"), tmp_path / "unet.safetensors"
    save_file(tiny.read(folder_of(root, "sd2") / "unet"), unet)
    assert load_parts(folder, unet=unet).identity.prediction == "v_prediction"
    plain = folder_of(root, "sd2")
    assert load_parts(plain, unet=unet).identity.prediction == "epsilon"
    parts = load_parts(plain, unet=marked(unet, tmp_path / "v.safetensors", {"v_pred": ONE}))
    assert parts.identity.prediction == "v_prediction"
    assert dict(parts.identity.evidence)["prediction v_prediction"] == "tensor v_pred"


# Continuous noise levels


def test_playground(root: Path) -> None:
    parts = loaded(file_of(root, "playground"))
    assert parts.process == EdmProcess(0.002, 80.0, 0.5)
    assert isinstance(parts.parameterisation, Edm)
    assert (parts.defaults.sampler, parts.defaults.spacing, parts.defaults.guidance_scale) == (
        "dpmpp_2m",
        "karras",
        3.0,
    )
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(tiny.STATISTICS[f"latents_{n}"])[:, None, None] for n in ("mean", "std"))
    torch.testing.assert_close(parts.vae.config.unscaled(z), z * std / 0.5 + mean)  # diffusers' SDXL pipeline
    torch.testing.assert_close(parts.vae.config.scaled(parts.vae.config.unscaled(z)), z)


def test_cosxl(root: Path, tmp_path: Path) -> None:
    marks = {"edm_vpred.sigma_max": torch.tensor(100.0), "edm_vpred.sigma_min": torch.tensor([0.01])}
    parts = load_parts(marked(file_of(root, "sdxl"), tmp_path / "a.safetensors", marks))
    assert parts.process == EdmProcess(pytest.approx(0.01), 100.0, 1.0)  # type: ignore[arg-type]
    assert parts.identity.prediction == "edm_v"
    assert parts.defaults.spacing == "exponential"
    assert parts.vae.config.scaling_factor == 0.13025


@pytest.mark.parametrize(
    "marks",
    [
        {"edm_vpred.sigma_max": torch.tensor(float("nan"))},
        {"edm_vpred.sigma_max": torch.tensor([1.0, 2.0])},
        {"edm_vpred.sigma_max": torch.zeros(0)},
        {"edm_vpred.sigma_max": torch.tensor(-1.0)},
        {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.zeros(1, 4, 1, 1)},
        {"edm_mean": torch.full((4,), float("nan")), "edm_std": torch.ones(4)},
    ],
    ids=lambda marks: f"{next(iter(marks))} {list(next(reversed(marks.values())).flatten()[:2])}",
)
def test_marks_that_are_no_numbers_are_refused(root: Path, tmp_path: Path, marks: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_parts(marked(file_of(root, "sdxl"), tmp_path / "a.safetensors", marks))
    assert "\n" not in str(caught.value)


# Asked for


@pytest.mark.parametrize("asked", ["epsilon", "v_prediction", "sample"])
def test_another_prediction_may_be_asked_for(root: Path, asked: str) -> None:
    parts = loaded(file_of(root, "sd1")).with_prediction(PARAMETERISATIONS[asked])
    assert parts.identity.prediction == parts.parameterisation.name == asked
    assert parts.identity.evidence[-1] == (f"prediction {asked}", "asked for")
    assert isinstance(parts.process, Process)


@pytest.mark.parametrize(
    ("kind", "asked"), [("playground", "epsilon"), ("sd3", "v_prediction"), ("sd1", "flow_prediction")]
)
def test_a_process_that_leaves_no_choice(root: Path, kind: str, asked: str) -> None:
    parts = loaded(file_of(root, kind))
    with pytest.raises(RequestError, match=f"cannot be read as {asked}"):
        parts.with_prediction(PARAMETERISATIONS[asked])


def test_stable_diffusion_3_is_a_flow(root: Path) -> None:
    parts = loaded(file_of(root, "sd3"))
    assert parts.process == FlowProcess(1000, 3.0)
    assert parts.parameterisation.name == "flow_prediction"


DEFAULTS: dict[str, tuple[str, str, int, float, int]] = {
    "sd1": ("pndm", "leading", 50, 7.5, 64),
    "sd2": ("pndm", "leading", 50, 7.5, 64),
    "unclip": ("ddim", "leading", 50, 7.5, 96),
    "x4-upscaler": ("ddim", "leading", 75, 9.0, 128),
    "sdxl": ("euler", "leading", 50, 5.0, 128),
    "refiner": ("euler", "leading", 50, 5.0, 128),
    "sd3": ("euler", "uniform", 28, 7.0, 128),
    "sd35-large": ("euler", "uniform", 28, 3.5, 128),
    "sd35-medium": ("euler", "uniform", 40, 4.5, 128),
}


@pytest.mark.parametrize("kind", list(DEFAULTS))
def test_defaults_of_a_single_file(root: Path, kind: str) -> None:
    """Of the published folders; sizes in latents."""
    parts = loaded(file_of(root, kind))
    d, factor = parts.defaults, parts.vae.config.factor
    assert (d.sampler, d.spacing, d.steps, d.guidance_scale, d.width // factor) == DEFAULTS[kind]
    assert d.width == d.height
    assert d.rules.tables == {"sd2": "sd1"}.get(parts.identity.family, parts.identity.family)
