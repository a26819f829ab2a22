"""The configuration of a training run: a TOML file, checked before any work begins."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from reverie.errors import ConfigError
from reverie.train.scenes.config import ScenesConfig


class Section(BaseModel):
    """A part of the file; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Section):
    """Which pictures are learned.

    Attributes:
        folder: holds `pictures.npy` and `captions.jsonl`.
        only: keep the pictures whose caption line has one of these values in these fields.
    """

    folder: Path
    only: dict[str, list[str]] = {}


def _kind(data: Any) -> str:
    """Which kind of data a section describes."""
    return "scenes" if getattr(data, "kind", None) == "scenes" or (isinstance(data, dict) and "kind" in data) else "set"


Data: TypeAlias = Annotated[
    Annotated[DataConfig, Tag("set")] | Annotated[ScenesConfig, Tag("scenes")], Discriminator(_kind)
]


class LoopConfig(Section):
    """The loop.

    Attributes:
        start: the checkpoint of another run, whose averaged weights this one begins with.
        batch: pictures a step and accumulation.
        accumulate: micro-batches whose gradients are added before a step.
        warmup: steps over which the learning rate rises; then it falls along a cosine to zero.
        ema: decay of the averaged weights, which are the ones that are exported.
        workers: processes that compose pictures ahead; 0 is one thread, enough beside a CPU that trains.
        sample_every: steps from one sheet of samples to the next, in `samples/` below `out`; 0 for none.
        tensorboard: whether TensorBoard's files are written, too, to `events/` below `out`.
    """

    out: Path
    start: Path | None = None
    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    accumulate: int = Field(1, gt=0)
    learning_rate: float = Field(gt=0)
    warmup: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    ema: float = Field(0.999, ge=0, lt=1)
    seed: int = Field(0, ge=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    workers: int = Field(0, ge=0)
    checkpoint_every: int = Field(500, gt=0)
    sample_every: int = Field(0, ge=0)
    tensorboard: bool = False


class AutoencoderModel(Section):
    """Shape of the autoencoder; see `reverie.nets.autoencoder.AutoencoderConfig`."""

    block_out_channels: tuple[int, ...]
    latent_channels: int = Field(4, gt=0)
    layers_per_block: int = Field(1, gt=0)
    groups: int = Field(8, gt=0)


class AutoencoderLoss(Section):
    """Weights of the parts of the autoencoder's loss; the absolute error has weight 1."""

    square: float = Field(1.0, ge=0)
    gradient: float = Field(1.0, ge=0)
    kl: float = Field(1e-3, ge=0)


class AutoencoderRun(Section):
    """`reverie train autoencoder CONFIG.toml`."""

    data: Data
    loop: LoopConfig
    model: AutoencoderModel
    loss: AutoencoderLoss = AutoencoderLoss()


class DiffusionModel(Section):
    """Shape of text encoder and U-Net; see `ClipTextConfig` and `UNetConfig`."""

    block_out_channels: tuple[int, ...]
    attention: tuple[bool, ...]
    heads: int = Field(4, gt=0)
    layers_per_block: int = Field(1, gt=0)
    groups: int = Field(32, gt=0)
    text_width: int = Field(gt=0)
    text_layers: int = Field(gt=0)
    text_heads: int = Field(4, gt=0)
    text_positions: int = Field(77, gt=2)


class DiffusionObjective(Section):
    """What is predicted, over which noise schedule, with which weights.

    Attributes:
        snr_gamma: min-SNR weighting (Hang et al. 2023), usually 5; None weighs every timestep alike. Not with zero
            terminal SNR, where it would give the first step of sampling no weight.
        drop_caption: share of captions replaced by the empty one, for classifier-free guidance.
    """

    prediction: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = False
    snr_gamma: float | None = None
    drop_caption: float = Field(0.1, ge=0, le=1)


class Samples(Section):
    """The sheet that is drawn on the way.

    Attributes:
        prompts: one picture each; the first captions of the data if there are none.
    """

    prompts: list[str] = []
    seed: int = Field(0, ge=0)
    columns: int = Field(8, gt=0)


class DiffusionRun(Section):
    """`reverie train diffusion CONFIG.toml`.

    Attributes:
        autoencoder: folder of a trained autoencoder (the `vae` folder of its export).
        tokenizer: folder with `vocab.json` and `merges.txt`.
        defaults: what the exported model draws with where a request does not say.
    """

    data: Data
    loop: LoopConfig
    model: DiffusionModel
    objective: DiffusionObjective = DiffusionObjective()
    autoencoder: Path
    tokenizer: Path
    samples: Samples = Samples()
    defaults: dict[str, int | float | str] = {}


class TuningRun(Section):
    """What adapters of a finished model are trained with.

    Attributes:
        model: a file or folder; the bundled model if absent.
        drop_caption: share of captions replaced by the empty one.
        snr_gamma: min-SNR weighting; see `DiffusionObjective`.
    """

    model: Path | None = None
    data: Data
    loop: LoopConfig
    drop_caption: float = Field(0.1, ge=0, le=1)
    snr_gamma: float | None = None
    samples: Samples = Samples()


class LoraRun(TuningRun):
    """`reverie train lora CONFIG.toml`.

    Attributes:
        alpha: the numerator of the scale `alpha / rank`; the rank if absent.
        layers: `attention`, every `linear` layer, or `all`, convolutions too.
        text_encoder: whether the text encoders learn, too.
        dialect: names of the file; see `reverie.adapters.lora_save`.
    """

    rank: int = Field(8, gt=0)
    alpha: float | None = Field(None, gt=0)
    layers: Literal["attention", "linear", "all"] = "attention"
    text_encoder: bool = False
    dialect: Literal["kohya", "diffusers"] = "kohya"


class ControlRun(TuningRun):
    """`reverie train controlnet CONFIG.toml`.

    Attributes:
        preprocessor: what makes control pictures of the pictures; see `reverie control --list`.
        options: its settings.
        widths: of the layers that bring the control picture to the size of the latents; by the VAE if absent.
    """

    preprocessor: str = "canny"
    options: dict[str, int | float | bool | str] = {}
    widths: list[int] | None = None


class JudgeModel(Section):
    """Shape of the judge; see `reverie.nets.judge.JudgeConfig`. Widths are multiples of 8."""

    finder: tuple[int, int, int] = (16, 24, 48)
    namer: tuple[int, int, int] = (32, 64, 128)
    hidden: int = Field(256, gt=0)


class Blemishes(Section):
    """What is done to true pictures, so that what was drawn is judged as fairly.

    Attributes:
        bend: pixels by which parts of a picture are moved.
        soften: share of pictures that are blurred.
        tint: by how much brightness, contrast and each colour channel change.
        noise: the most noise, where pixels are in [-1, 1].
        encode: share of pictures that go through the autoencoder, if there is one.
        latent_noise: the most noise on their latents, which have variance 1.
    """

    bend: float = Field(1.2, ge=0)
    soften: float = Field(0.4, ge=0, le=1)
    tint: float = Field(0.08, ge=0, lt=1)
    noise: float = Field(0.12, ge=0)
    encode: float = Field(0.25, ge=0, le=1)
    latent_noise: float = Field(0.25, ge=0)


class JudgeRun(Section):
    """`reverie train judge CONFIG.toml`.

    Attributes:
        autoencoder: folder of a trained autoencoder, which some pictures go through.
    """

    data: ScenesConfig
    loop: LoopConfig
    model: JudgeModel = JudgeModel()
    blemishes: Blemishes = Blemishes()
    autoencoder: Path | None = None


Run = TypeVar("Run", AutoencoderRun, DiffusionRun, LoraRun, ControlRun, JudgeRun)


def read_config(kind: type[Run], path: Path) -> Run:
    """Read and check a TOML file.

    `extends = "other.toml"` at its head (from its own folder) takes the other file's keys where it has none itself.

    Raises:
        ConfigError: no such file, not TOML, unknown or missing keys, values out of range; the first problem is named.
    """
    try:
        return kind.model_validate(_tables(path, ()))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in {"set", "scenes"})
        raise ConfigError(f"{path}: {where}: {first['msg']}") from None


def _tables(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """What a file says, over what the one that it extends says."""
    if path.resolve() in seen:
        raise ConfigError(f"{path} extends itself")
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        asking = f", which {seen[-1]} extends" if seen else ""
        raise ConfigError(f"no configuration file {path}{asking}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    other = own.pop("extends", None)
    if other is None:
        return own
    if not isinstance(other, str):
        raise ConfigError(f"{path}: extends: found {other!r}, expected the name of a TOML file")
    return _over(own, _tables(path.parent / other, (*seen, path.resolve())))


def _over(own: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Table by table; anything else in `own`, a list too, stands for all of what `other` has there."""
    both = own.keys() & other.keys()
    tables = {key for key in both if isinstance(own[key], dict) and isinstance(other[key], dict)}
    return other | own | {key: _over(own[key], other[key]) for key in tables}
