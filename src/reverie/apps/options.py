"""Options that several commands share: how a model is opened, and the fields of a request."""

import inspect
from collections.abc import Callable, Iterable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from reverie.apps.flags import parameters


class Precision(StrEnum):
    """In which numbers the networks compute."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Weights(StrEnum):
    """How weights are kept."""

    auto = "auto"
    packed = "packed"
    full = "full"
    fp8 = "fp8"
    int8 = "int8"
    int4 = "int4"


class Compile(StrEnum):
    """When the blocks of the denoising network are compiled."""

    auto = "auto"
    off = "off"
    on = "on"


class SpeedMode(StrEnum):
    """How layers are computed."""

    auto = "auto"
    plain = "plain"


ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="safetensors file or diffusers folder; the bundled model if absent"),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto")]
PrecisionOption = Annotated[Precision, typer.Option(help="numbers the networks compute in")]
VariantOption = Annotated[str | None, typer.Option(help="of a folder's weight files, for example fp16")]
PredictionOption = Annotated[
    str | None, typer.Option(help="override what the file says it predicts: epsilon, v, sample")
]
ConfigArgument = Annotated[Path, typer.Argument(help="TOML file")]
UntilOption = Annotated[int | None, typer.Option(min=1, help="stop after this step; the next run goes on from there")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
DebugOption = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
VaeOption = Annotated[str | None, typer.Option("--vae", help="file or folder the VAE comes from instead")]
UnetOption = Annotated[str | None, typer.Option("--unet", help="file or folder the U-Net comes from instead")]
TextEncoderOption = Annotated[
    str | None, typer.Option("--text-encoder", help="file or folder the text encoders come from instead")
]
EmaOption = Annotated[bool, typer.Option("--ema", help="the averaged U-Net that a single file may hold")]
WeightsOption = Annotated[
    Weights,
    typer.Option(
        "--weights",
        help="GGUF and 8-bit floats stay packed in memory, or take their full size; "
        "fp8, int8, int4: all weights are quantised as they are opened, which changes pictures",
    ),
]
CompileOption = Annotated[
    Compile,
    typer.Option("--compile", help="compile the network's blocks: minutes, once on a machine; see docs/speed.md"),
]
SpeedOption = Annotated[
    SpeedMode, typer.Option("--speed", help="each layer in the fastest way on this machine, or in torch's usual one")
]
OffloadOption = Annotated[bool, typer.Option("--offload", help="keep one part of the model at a time on the device")]
MemoryOption = Annotated[
    str | None, typer.Option("--memory", help="the most that weights and activations may take, for example 6G")
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="say what was planned and what was used: memory and seconds")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="file, or folder; reverie-00001.png here if absent")
]
PreviewOption = Annotated[int, typer.Option(min=0, help="show the picture every so many evaluations; 0 never")]
PreviewOutOption = Annotated[
    Path | None, typer.Option(help="file for previews, written anew each time; the terminal if absent")
]
PreviewDecoderOption = Annotated[
    Path | None, typer.Option(help="a tiny decoder's file (taesd_decoder.safetensors) for sharper previews")
]
MetadataOption = Annotated[bool, typer.Option("--metadata/--no-metadata", help="write into pictures what made them")]

Opening = tuple[str | None, dict[str, Any]]


def model_options(
    model: ModelOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.auto,
    variant: VariantOption = None,
    prediction: PredictionOption = None,
    vae: VaeOption = None,
    unet: UnetOption = None,
    text_encoder: TextEncoderOption = None,
    ema: EmaOption = False,
    offload: OffloadOption = False,
    memory: MemoryOption = None,
    packed: WeightsOption = Weights.auto,
    speed: SpeedOption = SpeedMode.auto,
    compiling: CompileOption = Compile.auto,
) -> Opening:
    """The model that is asked for, and how it is opened: options of every command that draws."""
    return model, {
        "device": device, "precision": precision.value, "variant": variant, "prediction": prediction, "vae": vae,
        "unet": unet, "text_encoder": text_encoder, "ema": ema, "offload": offload, "weights": packed.value,
        "memory": memory,
        "speed": speed.value, "compile": compiling.value,
    }  # fmt: skip


def request_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `model_options`, whose answer is its `opening`, and one option for every field of
    `Request`, named and described by the field.
    """
    opening = inspect.signature(model_options).parameters

    def shown() -> Iterable[inspect.Parameter]:
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name == "opening":
                yield from (option.replace(kind=option.KEYWORD_ONLY) for option in opening.values())
            elif parameter.name != "flags":
                yield parameter

    @wraps(function)
    def command(**given: Any) -> None:
        function(opening=model_options(**{name: given.pop(name) for name in opening}), **given)

    command.__signature__ = inspect.Signature([*shown(), *parameters()])  # type: ignore[attr-defined]
    return command
